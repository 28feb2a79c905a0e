"""Check Theorem 1 and Corollary 1 of Selective Amnesia exactly, on tables of probabilities; seconds on one core.

    python scripts/theorem_study.py --output_dir runs/theorem

Writes theorem.json, which docs/results/theorem.md is made of.
"""

import argparse
from pathlib import Path

from sa_diffusers.io.atomic_files import write_json
from studies.rows import table_of
from studies.theorem import bound_rows, objective_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/theorem"), help="default: %(default)s")
    parser.add_argument("--tables", type=int, default=20, help="random p(x|c) to check on; default: %(default)s")
    args = parser.parse_args()
    if args.tables < 1:
        parser.error(f"--tables: expected 1 or more, got {args.tables}")
    found = {"bound": bound_rows(args.tables), "objective": objective_rows(args.tables)}
    write_json(found, args.output_dir / "theorem.json")
    print("\n".join(table_of(rows) for rows in found.values()))


if __name__ == "__main__":
    main()
