"""What shows a run: its page, the page of several strengths of it, and a few lines in a notebook."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_diffusers.report.curves import SIDES, curves_png, figure_png, holes_figure
from sa_diffusers.report.metrics_table import metric_rows
from sa_diffusers.report.page import render, write_page
from sa_diffusers.report.pictures import before_after, by_group, data_uri, figure, first_of_each


def write_report(
    path: str | Path,
    *,
    metrics: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    prompts: Mapping[str, Sequence[Mapping[str, Any]]],
    **said: Any,
) -> None:
    """Write one HTML page that needs nothing else: no network, no script, pictures and numbers inside.

    Args:
        metrics: see `metric_rows`; and "verdict": {"said", "advice"}, of `verdict`.
        pairs, history: see `before_after` and `curves_png`; may be empty.
        config: the resolved configuration.
        prompts: of each set, {"prompt", "seeds"}.
        said: title; summary, what was done, in words; record, what holds the page to a model and a moment, and
            commands, to repeat and to go on, by their names; seconds, of wall-clock by stage, where a list under
            "reused" names those that were not computed again; amounts, {stage: {"count", "of", "per_second"}}, what
            each stage worked through; fisher, its metadata or None; notes, one sentence each; sheet, whether
            strength.html lies beside it; choices, {"said", "figures", "open"} of each concept whose surrogate the
            model chose; requests, of a chain, see `request_table`, or None.
    """
    groups = {
        name: [
            figure(pair.get("beside", {}) | {side: pair[side] for side in SIDES if side in pair}, pair["prompt"])
            for pair in part
        ]
        for name, part in by_group(pairs).items()
    }
    holes = holes_figure(metrics, config.get("eval_masks", ()))
    numbers = json.dumps({"metrics": metrics, "prompts": prompts}, ensure_ascii=False, default=str).encode()
    write_page(
        path,
        "report.html.j2",
        verdict=metrics["verdict"],
        rows=metric_rows(metrics),
        of_classes=metric_rows(metrics, "by_class"),
        constants=metric_rows(metrics, "constant"),
        with_intervals="intervals" in metrics,
        groups=groups,
        holes=data_uri(figure_png(holes)) if holes else None,
        curves=data_uri(curves_png(history)) if history else None,
        history=history,
        prompts=prompts,
        data=f"data:application/json;base64,{base64.b64encode(numbers).decode()}",
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
        **said,
    )


def write_strength_page(
    path: str | Path,
    *,
    judged: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Sequence[Mapping[str, Any]]],
    **said: Any,
) -> None:
    """Write the page of a run at several strengths, to choose one of them.

    Args:
        judged: metrics.json of each strength, by what it is called, the weakest first; see `write_report`.
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
    figures = []
    for first, *rest in shown:  # of one prompt and seed
        after = {name: pair["after"] for name, pair in zip(pairs, (first, *rest), strict=True)}
        tiles = first.get("beside", {}) | {"before": first["before"]} | after
        figures.append({"group": first["group"], "figure": figure(tiles, first["prompt"])})
    verdicts = {name: metrics["verdict"] for name, metrics in judged.items()}
    strips = {name: [one["figure"] for one in part] for name, part in by_group(figures).items()}
    write_page(path, "strength.html.j2", verdicts=verdicts, rows=rows, groups=strips, **said)


def notebook_view(metrics: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Verdict, pictures and numbers of a run as a notebook shows them, in HTML."""
    strip, buffer = None, io.BytesIO()
    if pairs:
        before_after(first_of_each(pairs, 4)).save(buffer, format="PNG")
        strip = data_uri(buffer.getvalue())
    return render("notebook.html.j2", strip=strip, rows=metric_rows(metrics), **metrics["verdict"])
