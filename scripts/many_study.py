"""Many concepts on the bundled pipeline: several at once, one after another with memory, and their adapters composed.

    python scripts/many_study.py --output_dir runs/many --seeds 0 1 2
    python scripts/many_study.py --output_dir runs/many --rows "in turn"
    python scripts/many_study.py --output_dir runs/many-quick --quick --rows "at once, 1: uce"

Leaves study.json with every number, study.md with tables and what must be shown, and study.png with what each way does
request by request. Every run and every judged row is kept, and what one has drawn serves the others: to resume, run
the same command again, which also adds what a row of an older study was not measured by. A seed takes two hours of one
core.
"""

from pathlib import Path

from sa_diffusers import methods
from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from studies.many import ManyConfig, run_study
from studies.many_figure import draw_curves
from studies.many_tables import tables
from studies.projection import PROJECTED


def main() -> None:
    config = parse_config(ManyConfig, description=__doc__)
    methods.register(PROJECTED)
    with friendly_errors():
        found, path = run_study(config), Path(config.output_dir) / "study.json"
        print(tables(found))
        figure = draw_curves(found, path.with_name("study.png"))
        print(f"saved {path}" + (f", {figure} beside it" if figure else ""))


if __name__ == "__main__":
    main()
