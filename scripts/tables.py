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
from studies.i2i import sections as i2i
from studies.many_tables import tables as tables_of_many
from studies.rivals.spec import read_spec
from studies.rivals.table import markdown as methods_table
from studies.robust import markdown as robust_tables
from studies.rows import duration, table_of


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- /table -->)", re.S)


def read(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def quickstart() -> str:
    """The run of configs/digits.yaml: what it measured and how long it took."""
    return before_and_after("quickstart")


def before_and_after(name: str) -> str:
    rows = [[row.label, row.before, row.after] for row in metric_rows(read(name)) if row.before != row.after]
    return markdown_table(["measure", "before", "after"], rows)


def flow() -> str:
    """The run of configs/digits_flow.yaml."""
    return before_and_after("flow")


def flow_base() -> str:
    """What the bundled flow draws beside the bars of a base model."""
    return table_of(read("flow_base")["bars"])


def flow_paths() -> str:
    """Which way a digit enters the bundled flow."""
    rows = [row | {"interval": "{:.2f} to {:.2f}".format(*row["interval"])} for row in read("flow_paths")["rows"]]
    return table_of(rows)


def flow_fisher() -> str:
    """The cheap Fisher of the bundled flow beside two larger draws."""
    return table_of(read("flow_fisher"))


def flow_methods() -> str:
    """Methods side by side on the bundled flow, a table a concept."""
    return side_by_side("flow_methods", "digits_flow")


def finish() -> str:
    """Training that ends with an edit, beside training that starts at one."""
    return side_by_side("finish", "digits")


def side_by_side(name: str, specs: str) -> str:
    """A table of methods a concept, of a methods.json."""
    folder = ROOT / "configs" / "paper" / specs
    return "\n".join(methods_table(read_spec(folder / f"{key}.yaml"), rows) for key, rows in read(name).items())


def attacks() -> str:
    """Every attack on a run of configs/digits_edit.yaml."""
    return markdown_table(*attack_table(read("attacks")))


def robust() -> str:
    """How well it stays forgotten, of each concept; and by how much the recipe misses what it must reach."""
    there = (ROOT / "docs" / "results" / "robust.json").exists()
    return robust_tables(read("robust")) if there else "Not measured yet."


def theorem_bound() -> str:
    """Corollary 1's two sides, by the model's weights."""
    return table_of(read("theorem")["bound"])


def theorem_objective() -> str:
    """How much of Corollary 1's gap the whole objective reaches."""
    return table_of(read("theorem")["objective"])


def auto() -> str:
    """What the model chooses in the place of a concept."""
    rows: dict[str, dict[str, str]] = {}
    for model, choices in read("auto").items():
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


def many() -> str:
    """Several concepts at once, in turn and composed."""
    return tables_of_many(read("many")["rows"])


def quickstart_seconds() -> str:
    """Its stages."""
    seconds = {name: value for name, value in read("quickstart")["seconds"].items() if name != "reused"}
    return markdown_table(seconds, [[f"{value:.0f} s" for value in seconds.values()]])


def measured() -> str:
    """Stages on the bundled pipeline, each beside the way that it is compared with."""
    rows = [
        [
            row["stage"],
            row["way"],
            f"{row['seconds'] * 1e3:.3g} ms per {row['unit']}",
            "" if row["than"] == row["way"] else f"{row['times_faster']:.2f} times as fast as {row['than']}",
        ]
        for row in read("cost_tiny")["stages"]
    ]
    return markdown_table(["stage", "way", "time", "compared"], rows)


def whole_runs() -> str:
    """Whole runs on the bundled pipeline, extrapolated from these."""
    names = ("sampling", "Fisher", "training", "total")
    rows = [
        [run["run"], run["way"], *(duration(run["seconds"][name]) for name in names)]
        for run in read("cost_tiny")["whole_runs"]
    ]
    return markdown_table(["run", "way", *names], rows)


def counted() -> str:
    """Times of Stable Diffusion 1.4 at shares of a peak."""
    times = read("cost_sd14")["times"]
    jobs = list(dict.fromkeys(row["job"] for row in times))
    totals = {(row["share of peak"], row["job"]): row["total"] for row in times}
    rows = [[share, *(totals[share, job] for job in jobs)] for share in dict.fromkeys(share for share, _ in totals)]
    return markdown_table(["share of an H200's dense bf16 peak", *jobs], rows)


def memory() -> str:
    """Peaks of training and of the other stages."""
    found = read("cost_sd14")
    rows = [[f"training, {row['training']}", f"{row['peak']:.1f} GB"] for row in found["memory"]]
    rows += [[row["stage"], f"{row['peak']:.1f} GB"] for row in found["stage_memory"]]
    return markdown_table(["4 + 4 samples, bf16", "peak"], rows)


def large() -> str:
    """What a LoRA of the large families needs of a card, stage by stage."""
    found = {size: read(f"cost_{size}") for size in ("sdxl", "sd3", "flux")}
    rows = {f"training, {row['training']}": [] for row in found["sdxl"]["memory"]}
    rows |= {"the same, EWC's Fisher in main memory": []} | {row["stage"]: [] for row in found["sdxl"]["stages"]}
    for one in found.values():
        peaks = [*(row["peak"] for row in one["memory"]), one["memory"][-1]["peak, Fisher in main memory"]]
        for cells, peak in zip(rows.values(), peaks + [row["peak"] for row in one["stages"]], strict=True):
            cells.append(f"{peak:.1f} GB")
    rows["needed of a card"] = [f"{one['needed']:.1f} of {one['limit']} GB" for one in found.values()]
    rows["the same, linear layers in 4 bits"] = [f"{one['needed in 4 bits']:.1f} GB" for one in found.values()]
    return markdown_table(["1 + 1 samples", *found], [[name, *cells] for name, cells in rows.items()])


def sdxl_run() -> str:
    """A whole run of Stable Diffusion XL on a CPU: what its stages held, beside what is counted."""
    found = read("cost_sdxl_run")
    rows = [
        [row["stage"], duration(row["seconds"]), f"{row['measured']:.1f} GB", f"{row['counted']:.1f} GB"]
        for row in found["stages"]
    ]
    return markdown_table(["stage", "time", "measured peak", "counted peak"], rows)


def ewc() -> str:
    """What EWC adds to a training step."""
    rows = read("cost_sd14")["ewc_share"]
    shares = [name for name in rows[0] if name != "samples"]
    cells = [[row["samples"], *(f"{row[share]:.1%}" for share in shares)] for row in rows]
    return markdown_table(["samples in a step", *shares], cells)


def preference() -> str:
    """The verdict without a classifier beside that of one: shares, and how far they agree."""
    found = read("preference")
    scales = [row["scale"] for row in found["cases"][0]["models"]]
    rows = []
    for case in [*found["cases"], {"case": "all", "models": []} | found["together"]]:
        cells = [f"{row['classifier']:.0%} / {row['preference']:.0%}" for row in case["models"]]
        agree = [f"{case['agreement']:.1%}", f"{case['missed']:.1%}", f"{case['false_alarms']:.1%}"]
        bias = measured_by(case["bias"], case["bias_interval"], "+.1%")
        rows.append([case["case"], *(cells or [""] * len(scales)), *agree, bias, f"{case['rank_correlation']:.2f}"])
    header = ["concept → surrogate", *(f"at {scale:g}" for scale in scales), "agree", "missed", "false alarms"]
    return markdown_table([*header, "difference", "rank correlation"], rows)


def i2i_rows() -> str:
    """Every row of the study of completions."""
    return i2i.rows_table(read("i2i"))


def i2i_probes() -> str:
    """What its models still know."""
    return i2i.probes_table(read("i2i"))


def i2i_equal() -> str:
    """Its methods where they forget equally."""
    return i2i.equal_table(read("i2i"))


def i2i_bars() -> str:
    """What was asked of it, and what was found."""
    return i2i.bars_table(read("i2i"))


def i2i_cost() -> str:
    """Completion at real size."""
    return table_of(read("cost_i2i"))


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        attacks,
        robust,
        quickstart,
        auto,
        many,
        quickstart_seconds,
        measured,
        whole_runs,
        counted,
        memory,
        large,
        sdxl_run,
        ewc,
        preference,
        flow,
        flow_base,
        flow_paths,
        flow_fisher,
        flow_methods,
        finish,
        theorem_bound,
        theorem_objective,
        i2i_rows,
        i2i_probes,
        i2i_equal,
        i2i_bars,
        i2i_cost,
    )  # fmt: skip
}


def renewed(text: str) -> str:
    """A page with its tables as their JSON has them. Raises ValueError for a table that nothing makes."""

    def table(marked: re.Match) -> str:
        if marked[2] not in TABLES:
            raise ValueError(f"expected a table of {', '.join(TABLES)}, got {marked[2]!r}")
        return f"{marked[1]}{TABLES[marked[2]]()}\n"

    return MARKED.sub(table, text)


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
