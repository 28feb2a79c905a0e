"""Measure forgetting on the bundled pipeline: seeds, every digit, a colour, and what each part of the method brings.

    python scripts/digits_study.py --output_dir runs/digits_study
    python scripts/digits_study.py --output_dir runs/digits_study --only default,noise

Every row is a run of scripts/forget.py with configs/digits.yaml and the overrides of the row; its folder has a page.
Samples, Fisher and the evaluation of the unforgotten model are computed once and shared by path. To resume, run the
same command again. Writes study.json, study.md and curves.png.
"""

import argparse
from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.runs.options import ForgetConfig
from studies.digits import PARTS, run_parts, write_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/digits_study"), help="default: %(default)s")
    parser.add_argument("--config", default="configs/digits.yaml", help="default: %(default)s")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, of: %(default)s")
    parser.add_argument("--num_threads", default="2", help="CPU threads; default: %(default)s")
    args = parser.parse_args()
    wanted = args.only.split(",")
    unknown = set(wanted) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    options = [
        "--track_steps",
        "25",
        "--track_images",
        "64",
        "--num_threads",
        args.num_threads,
        "--mixed_precision",
        "no",
    ]
    base = parse_config(ForgetConfig, ["--config", args.config, *options])
    with friendly_errors():
        run_parts(base, wanted, args.output_dir)
        print(f"{write_study(args.output_dir)}\n{args.output_dir / 'study.md'}, {args.output_dir / 'curves.png'}")


if __name__ == "__main__":
    main()
