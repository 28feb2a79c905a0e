"""Robust training on the bundled pipeline: the plain recipe and the robust one under several searches.

    python scripts/robust_study.py --output_dir runs/robust
    python scripts/robust_study.py --output_dir runs/robust --concepts seven --seeds 0

Rows are those of configs/paper/digits/. Every run, judgement and search is kept: to resume, run the same command
again. All of it takes hours on two cores. Writes robust.json and robust.md.
"""

import argparse
from pathlib import Path

from sa_diffusers.cli.parse import friendly_errors
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.bundled import resolve
from studies.rivals.judging import Counts
from studies.rivals.spec import read_spec
from studies.robust import RobustStudy, make_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/robust"), help="default: %(default)s")
    parser.add_argument("--concepts", default="seven,red,bold", help="of configs/paper/digits; default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--images", type=float, default=2.5, help="pictures, as a share of that table's; default: 2.5")
    args = parser.parse_args()
    with friendly_errors():
        specs = [read_spec(Path("configs/paper/digits") / f"{name}.yaml") for name in args.concepts.split(",")]
        seeds = [int(seed) for seed in args.seeds.split(",")]
        classifier = load_classifier(resolve("bundled/digits/classifier")).eval()
        print(make_study(RobustStudy(specs, args.output_dir, classifier, Counts().scaled(args.images), seeds)))


if __name__ == "__main__":
    main()
