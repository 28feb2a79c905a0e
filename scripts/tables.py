"""Write the tables of README and docs anew from docs/results/*.json, between their markers in the markdown.

    python scripts/tables.py
    python scripts/tables.py --check

A table stands between <!-- table: NAME --> and <!-- /table -->; with --check nothing is written, and one that differs
from its JSON is named and ends the command with 1. docs/results/index.md says which command writes which JSON.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa_diffusers.attacks.results import table as attack_table
from sa_diffusers.report.metrics_table import metric_rows
from sa_diffusers.report.tables import markdown_table
from sa_diffusers.report.tables import measured as measured_by
from studies.costs import tables as costs
from studies.digits import PARTS as DIGITS
from studies.digits import table as digits_table
from studies.i2i import sections as i2i
from studies.many_tables import tables as tables_of_many
from studies.mnist.page import part_markdown
from studies.rivals.spec import read_spec
from studies.rivals.table import markdown as methods_table
from studies.robust import markdown as robust_tables
from studies.robust import short_table
from studies.rows import table_of
from studies.table1.table import markdown as table1


Found = Any  # what a command wrote, as JSON

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- /table -->)", re.S)


def read(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def before_and_after(metrics: Found) -> str:
    """The measures of a run that changed."""
    rows = [[row.label, row.before, row.after] for row in metric_rows(metrics) if row.before != row.after]
    return markdown_table(["measure", "before", "after"], rows)


def seeds(*runs: Found) -> str:
    """What runs of several seeds leave and lose; the largest loss of a class and of an attribute, named."""
    rows = []
    for seed, run in enumerate(runs):
        before, after = run["before"], run["after"]
        row = {"seed": seed}
        for label, name in {"concept": "concept_probability", "unseen": "concept_probability_unseen"}.items():
            row[label] = f"{after[name]:.3f}"
        for label, name in {"not named": "concept_rate_when_unnamed", "others": "retained_accuracy"}.items():
            row[label] = f"{before[name]:.3f} → {after[name]:.3f}"
        for label, name in {"class": "retained_accuracy_by_class", "attribute": "attribute_accuracy"}.items():
            lost = {one: value - after[name][one] for one, value in before[name].items()}
            worst = max(lost, key=lost.get)
            row[f"largest loss, {label}"] = f"{lost[worst]:.3f} ({worst})"
        rows.append(row)
    return table_of(rows)


def seconds(metrics: Found) -> str:
    """The stages of a run."""
    stages = {name: value for name, value in metrics["seconds"].items() if name != "reused"}
    return markdown_table(stages, [[f"{value:.0f} s" for value in stages.values()]])


def flow_paths(found: Found) -> str:
    """Which way a digit enters the bundled flow."""
    return table_of([row | {"interval": "{:.2f} to {:.2f}".format(*row["interval"])} for row in found["rows"]])


def side_by_side(specs: str) -> Callable[[Found], str]:
    """A table of methods a concept, of a methods.json."""
    folder = ROOT / "configs" / "paper" / specs
    return lambda found: "\n".join(
        methods_table(read_spec(folder / f"{concept}.yaml"), rows) for concept, rows in found.items()
    )


def auto(found: Found) -> str:
    """What the model chooses in the place of a concept."""
    rows: dict[str, dict[str, str]] = {}
    for model, choices in found.items():
        for concept, choice in choices.items():
            kept = [f"{one['word']} ({one['nats']:.1f})" for one in choice["finalists"] if one["passed_over"] is None]
            first, *then = kept
            said = f"**{first}**" + (f"; {', '.join(then)}" if then else "")
            row = rows.setdefault(concept, {"concept": concept, "by hand": choice["by_hand"]})
            row[f"`bundled/{model}`"] = said
            for whose, one in zip(("chosen", "by hand"), choice.get("forgotten", ()), strict=False):
                left, kept = one["concept_probability_unseen"], one["retained_accuracy"]
                row[f"forgotten with what is {whose}: left, kept"] = f"{left:.3f}, {kept:.3f}"
    return table_of(list(rows.values()))


def preference(found: Found) -> str:
    """The verdict without a classifier beside that of one: shares, and how far they agree."""
    scales = [row["scale"] for row in found["cases"][0]["models"]]
    rows = []
    for case in [*found["cases"], {"case": "all", "models": []} | found["together"]]:
        cells = [f"{row['classifier']:.0%} / {row['preference']:.0%}" for row in case["models"]]
        agree = [f"{case['agreement']:.1%}", f"{case['missed']:.1%}", f"{case['false_alarms']:.1%}"]
        bias = measured_by(case["bias"], case["bias_interval"], "+.1%")
        rows.append([case["case"], *(cells or [""] * len(scales)), *agree, bias, f"{case['rank_correlation']:.2f}"])
    header = ["concept → surrogate", *(f"at {scale:g}" for scale in scales), "agree", "missed", "false alarms"]
    return markdown_table([*header, "difference", "rank correlation"], rows)


def digits(part: str) -> Callable[[Found], str]:
    """A part of the study on the bundled pipeline."""
    return lambda found: digits_table(found[part])


def mnist(part: str) -> Callable[[Found], str]:
    """A part of the MNIST study, its text and its tables."""
    return lambda found: part_markdown(found["parts"][part])


def part(name: str) -> Callable[[Found], str]:
    """Rows of a part of a file, as they are."""
    return lambda found: table_of(found[name])


# A table's name in the pages: what makes it, and of which files of docs/results.
TABLES: dict[str, tuple[Callable[..., str], str]] = {
    "quickstart": (before_and_after, "quickstart"),
    "quickstart_seconds": (seconds, "quickstart"),
    "preference": (preference, "preference"),
    "auto": (auto, "auto"),
    "many": (lambda found: tables_of_many(found["rows"]), "many"),
    "attacks": (lambda found: markdown_table(*attack_table(found)), "attacks"),
    "robust": (robust_tables, "robust"),
    "robust_digit": (lambda found: short_table(found, "seven"), "robust"),
    "table1": (table1, "table1"),
    "robust_trials": (side_by_side("digits_robust_trials"), "robust_trials"),
    "flow": (before_and_after, "flow_seed_0"),
    "flow_seeds": (seeds, "flow_seed_0 flow_seed_1 flow_seed_2"),
    "flow_base": (part("bars"), "flow_base"),
    "flow_paths": (flow_paths, "flow_paths"),
    "flow_fisher": (table_of, "flow_fisher"),
    "flow_methods": (side_by_side("digits_flow"), "flow_methods"),
    "rivals": (side_by_side("digits"), "rivals"),
    **{f"digits_{name}": (digits(name), "digits") for name in DIGITS},
    **{f"mnist_{name}": (mnist(name), "mnist") for name in ("paper", "sequential", "attacks", "outliers")},
    "fisher": (table_of, "fisher"),
    "fisher_class_conditional": (table_of, "fisher_class_conditional"),
    "theorem_bound": (part("bound"), "theorem"),
    "theorem_objective": (part("objective"), "theorem"),
    "i2i_rows": (i2i.rows_table, "i2i"),
    "i2i_probes": (i2i.probes_table, "i2i"),
    "i2i_equal": (i2i.equal_table, "i2i"),
    "i2i_bars": (i2i.bars_table, "i2i"),
    "i2i_cost": (table_of, "cost_i2i"),
    "measured": (costs.measured, "cost_tiny"),
    "whole_runs": (costs.whole_runs, "cost_tiny"),
    "counted": (costs.counted, "cost_sd14"),
    "memory": (costs.memory, "cost_sd14"),
    "ewc": (costs.ewc, "cost_sd14"),
    "large": (costs.large, "cost_sdxl cost_sd3 cost_flux"),
    "sdxl_run": (costs.sdxl_run, "cost_sdxl_run"),
}


def table(name: str) -> str:
    """A table by its name. Raises ValueError for one that nothing makes."""
    if name not in TABLES:
        raise ValueError(f"expected a table of {', '.join(TABLES)}, got {name!r}")
    make, files = TABLES[name]
    return make(*map(read, files.split()))


def renewed(text: str) -> str:
    """A page with its tables as their JSON has them."""
    return MARKED.sub(lambda marked: f"{marked[1]}{table(marked[2])}\n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table differs")
    check = parser.parse_args().check
    differing = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            differing.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after, encoding="utf-8")
    if check and differing:
        sys.exit(f"tables differ from docs/results/*.json in {', '.join(differing)}: run `make tables`")


if __name__ == "__main__":
    main()
