"""How well it stays forgotten on the bundled pipeline: recipes, rivals and controls under every attack.

    python scripts/robust_study.py --output_dir runs/robust
    python scripts/robust_study.py --output_dir runs/robust --concepts seven --seeds 0 --images 0.5
    python scripts/robust_study.py --output_dir runs/robust --rows sa-robust,uce --once sa-search

Rows are those of configs/paper/digits/, at equal erasure; sa-edit is always one. A pipeline that never learned the
concept is another where --never has it. Every run, judgement and search is kept: to resume, or to add rows, run the
command again. One concept and seed takes a quarter of an hour of one core, seed 0 half an hour. Writes robust.json and
robust.md, which grow, and at the end a picture of them, robust.png.
"""

import argparse
import json
from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.bundled import resolve
from studies.rivals.spec import only_rows, read_spec
from studies.robust import EDIT, ROBUST, RobustStudy, make_study
from studies.robust_figure import draw_robustness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/robust"), help="default: %(default)s")
    parser.add_argument("--concepts", default="seven,red,bold", help="of configs/paper/digits; default: %(default)s")
    parser.add_argument("--rows", default=f"{EDIT},{ROBUST}", help="default: %(default)s")
    parser.add_argument("--once", default="", help="further rows, of the first seed alone; default: none")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--images", type=float, default=1.0, help="share of the pictures; default: %(default)s")
    parser.add_argument("--searches", type=int, default=3, help="for vectors, of each row; default: %(default)s")
    parser.add_argument("--classifier", default="bundled/digits/classifier", help="the judge; default: %(default)s")
    parser.add_argument("--never", default=RobustStudy.never, help="{} is the concept; default: %(default)s")
    args = parser.parse_args()
    with friendly_errors():
        specs = [read_spec(Path("configs/paper/digits") / f"{name}.yaml") for name in args.concepts.split(",")]
        once = [name for name in args.once.split(",") if name]
        specs = [only_rows(spec, [*args.rows.split(","), *once]) for spec in specs]
        classifier = load_classifier(resolve(args.classifier)).eval()
        seeds = [int(seed) for seed in args.seeds.split(",")]
        shared = args.never, args.searches, args.images
        study = RobustStudy(specs, args.output_dir, classifier, seeds, *shared, once=once)
        print(make_study(study))
        found = json.loads((args.output_dir / "robust.json").read_text(encoding="utf-8"))
        draw_robustness(found["concepts"], args.output_dir / "robust.png")


if __name__ == "__main__":
    main()
