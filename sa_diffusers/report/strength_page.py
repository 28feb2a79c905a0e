"""The page of a run at several strengths, to choose one of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_diffusers.report.metrics_table import metric_rows
from sa_diffusers.report.page import write_page
from sa_diffusers.report.pictures import by_group, figure, first_of_each


def write_strength_page(
    path: str | Path,
    *,
    judged: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Sequence[Mapping[str, Any]]],
    **said: Any,
) -> None:
    """Write it.

    Args:
        judged: metrics.json of each strength, by what it is called, the weakest first; see `run_page.write_report`.
        pairs: of each; see `pictures.before_after`.
        said: title; commands, which choose each; result, which of them is the run's.
    """
    tables = {name: {row.label: row for row in metric_rows(metrics)} for name, metrics in judged.items()}
    rows: dict[str, list[str]] = {}
    for label in dict.fromkeys(label for table in tables.values() for label in table):
        found = [table.get(label) for table in tables.values()]
        before = next(row.before for row in found if row)
        rows[label] = [before, *(row.after if row else "–" for row in found)]
    shown = zip(*map(first_of_each, pairs.values()), strict=True)
    figures = [
        (first["group"], figure(_tiles(first, same, list(pairs)), first["prompt"]))
        for same in shown
        for first in same[:1]
    ]
    groups = by_group([{"group": group, "figure": one} for group, one in figures])
    verdicts = {name: metrics["verdict"] for name, metrics in judged.items()}
    strips = {name: [one["figure"] for one in part] for name, part in groups.items()}
    write_page(path, "strength.html.j2", verdicts=verdicts, rows=rows, groups=strips, **said)


def _tiles(first: Mapping[str, Any], same: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The pictures of one prompt and seed, by their labels."""
    after = {name: pair["after"] for name, pair in zip(names, same, strict=True)}
    return first.get("beside", {}) | {"before": first["before"]} | after
