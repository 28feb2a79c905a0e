"""Measure images against real ones: FID, KID, Inception Score, precision and recall; and what a classifier reads.

Two folders of images:
    python scripts/evaluate.py real_images my_images --metrics fid,prc
A run of scripts/forget.py or scripts/train_base.py, whose images are drawn first, by the features of a classifier:
    python scripts/evaluate.py runs/forget_0 --real mnist --metrics fid,prc,classifier \
        --extractor runs/mnist_classifier/classifier --classifier runs/mnist_classifier/classifier

A run that forgot a class is compared over the retained classes alone. The default extractor, Inception, needs
`pip install -c constraints.txt -e ".[fid]"`; with any other the FID is called frechet_distance, the KID
kernel_distance and the Inception Score classifier_score, and none of them compares with published numbers. Precision
is the share of generated images that lie among the real ones, recall that of real images among the generated ones.
A folder alone stands for --run, two for --real and --generated, in this order.
"""

import sys
from itertools import takewhile
from pathlib import Path

from sa_diffusers.cli import friendly_errors, parse_config
from sa_diffusers.evaluation.evaluate_config import EvaluateConfig


def name_folders(argv: list[str]) -> list[str]:
    """The command line with the options' names put before leading folders."""
    folders = list(takewhile(lambda word: not word.startswith("-"), argv))
    names = {1: ["--run"], 2: ["--real", "--generated"]}.get(len(folders), [])
    named = [word for pair in zip(names, folders, strict=False) for word in pair]
    return named + argv[len(folders) if names else 0 :]


def main() -> None:
    config = parse_config(EvaluateConfig, name_folders(sys.argv[1:]), description=__doc__)
    with friendly_errors():
        from sa_diffusers.atomic_files import write_json
        from sa_diffusers.evaluation.image_evaluation import evaluate, table

        result = evaluate(config)
        output = config.output or (Path(config.run) / "evaluate.json" if config.run else None)
        if output is not None:
            write_json(result, output)
        print(f"\n{table(result)}" + (f"\n\nsaved {output}" if output is not None else ""))


if __name__ == "__main__":
    main()
