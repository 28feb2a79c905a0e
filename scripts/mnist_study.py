"""The MNIST study of Selective Amnesia, all of it: tables of the paper, sequential forgetting, attacks, latent space.

    accelerate launch scripts/mnist_study.py --output_dir runs/mnist_study
    accelerate launch scripts/mnist_study.py --output_dir runs/mnist_study --only attacks,latent

Trains what it is not given: the base model, and five classifiers with the authors' settings (--model and --classifier
take trained ones). Leaves study.json with every number, study.md with the tables, and report.html with all of it. To
resume, run the same command again.
"""

from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from studies.mnist.study import StudyConfig


def main() -> None:
    config = parse_config(StudyConfig, description=__doc__)
    with friendly_errors():
        from studies.mnist.page import PARTS, collect
        from studies.mnist.study import Study

        wanted = list(PARTS) if config.only is None else [name.strip() for name in config.only.split(",")]
        unknown = sorted(set(wanted) - set(PARTS))
        if unknown:
            raise ValueError(f"unknown part {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
        study = Study(config)
        study.load_given()
        for name in wanted:
            print(f"\n=== {name}", flush=True)
            study.part(name, PARTS[name])
            collect(study)  # after every part, so that an interrupted study has a page
        print(f"\nreport: {(Path(config.output_dir) / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
