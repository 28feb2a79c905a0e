r"""Measure images: any text-to-image pipelines side by side, a run of this package, or two folders.

Text-to-image pipelines, ours or not, by what is left of a concept and of everything else; the first is the reference:
    python scripts/evaluate.py bundled/digits/pipeline --compare runs/digits-seven --concept "seven, 7"
    python scripts/evaluate.py CompVis/stable-diffusion-v1-4 --compare runs/brad-pitt other/model \
        --concept "Brad Pitt" --neighbours "Tom Cruise, Johnny Depp" --metrics clip,identity,change
Two folders of images, by FID, KID, Inception Score, precision and recall:
    python scripts/evaluate.py real_images my_images --metrics fid,prc
A run of scripts/forget.py or scripts/train_base.py, whose images are drawn first, by the features of a classifier:
    python scripts/evaluate.py runs/forget_0 --real mnist --metrics fid,prc,classifier \
        --extractor runs/mnist_classifier/classifier --classifier runs/mnist_classifier/classifier

The first word decides: `python scripts/evaluate.py bundled/digits/pipeline --help` has the options for pipelines.

A run that forgot a class is compared over the retained classes alone. The default extractor, Inception, needs
`pip install -c constraints.txt -e ".[fid]"`; with any other the FID is called frechet_distance, the KID
kernel_distance and the Inception Score classifier_score, and none of them compares with published numbers. Precision
is the share of generated images that lie among the real ones, recall that of real images among the generated ones.
A folder alone stands for --run, two for --real and --generated, in this order.
"""

import sys
from pathlib import Path

from sa_diffusers.cli.parse import friendly_errors, parse_config
from sa_diffusers.evaluation.images.image_options import EvaluateConfig
from sa_diffusers.evaluation.suite.command import is_for_pipelines, leading_words, misplaced
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig


def name_folders(argv: list[str]) -> list[str]:
    """The command line with the options' names put before leading folders."""
    folders = leading_words(argv)
    names = {1: ["--run"], 2: ["--real", "--generated"]}.get(len(folders), [])
    named = [word for pair in zip(names, folders, strict=False) for word in pair]
    return named + argv[len(folders) if names else 0 :]


def main() -> None:
    argv = sys.argv[1:]
    if advice := misplaced(argv):
        print(f"{Path(sys.argv[0]).name}: error: {advice} (--help explains every option)", file=sys.stderr)
        raise SystemExit(2)
    if is_for_pipelines(argv):
        named = ["--pipeline", *argv] if leading_words(argv) else argv
        config = parse_config(PipelineEvaluationConfig, named, description=__doc__)
        with friendly_errors():
            from sa_diffusers.evaluation.suite.evaluate import evaluate_pipelines

            found = evaluate_pipelines(config)
            print(f"\n{found['summary']}\n\nsaved {found['output_dir']}: report.html, evaluation.md, evaluation.json")
        return
    config = parse_config(EvaluateConfig, name_folders(argv), description=__doc__)
    with friendly_errors():
        from sa_diffusers.evaluation.images.image_evaluation import evaluate, table
        from sa_diffusers.io.atomic_files import write_json

        result = evaluate(config)
        output = config.output or (Path(config.run) / "evaluate.json" if config.run else None)
        if output is not None:
            write_json(result, output)
        print(f"\n{table(result)}" + (f"\n\nsaved {output}" if output is not None else ""))


if __name__ == "__main__":
    main()
