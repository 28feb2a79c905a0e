"""How far to trust the verdict that needs no classifier: beside the one that has it, on the bundled model.

    python scripts/preference_study.py --output_dir runs/preference_study

Forgets a digit, a colour and a style in a LoRA each, and a digit in favour of noise; draws what asks for the concept
at several scales of each; and has the original model itself and the bundled classifier read the same pictures. Ten
minutes on one core. Writes preference.json, of which docs/results has a copy. The same command again resumes.
"""

import argparse
from pathlib import Path

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.io.atomic_files import write_json
from studies.preference import run_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/preference_study"), help="default: %(default)s")
    parser.add_argument("--num_images", type=int, default=48, help="pictures of each model; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    with friendly_errors():
        write_json(run_study(args.output_dir, args.num_images, args.seed), args.output_dir / "preference.json")
        print(args.output_dir / "preference.json")


if __name__ == "__main__":
    main()
