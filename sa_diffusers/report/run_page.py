"""The page of a run: pictures before and after, curves, a table of metrics, times, and what it was told."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_diffusers.report.curves import curves_png
from sa_diffusers.report.metrics_table import metric_rows
from sa_diffusers.report.page import write_page
from sa_diffusers.report.pictures import by_group, data_uri, embed


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str,
    metrics: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, Any],
    config: Mapping[str, Any],
    fisher: Mapping[str, Any] | None,
    notes: Sequence[str],
    amounts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write one HTML page that needs nothing else: no network, no script, pictures inside.

    Args:
        summary: the result in words.
        metrics: see `metric_rows`.
        pairs, history: see `save_before_after` and `curves_png`; may be empty.
        seconds: wall-clock seconds by stage; a list under "reused" names the stages that were not computed again.
        config, fisher: the resolved configuration; the Fisher's metadata or None.
        notes: warnings and limits, one sentence each.
        amounts: {stage: {"count", "of", "per_second"}}, what each stage worked through.
    """
    pictures = [{**pair, "before": embed(pair["before"]), "after": embed(pair["after"])} for pair in pairs]
    write_page(
        path,
        "report.html.j2",
        title=title,
        summary=summary,
        rows=metric_rows(metrics),
        with_intervals="intervals" in metrics,
        groups=by_group(pictures),
        curves={theme: data_uri(curves_png(history, theme == "dark")) for theme in ("light", "dark")},
        history=history,
        seconds=seconds,
        amounts=amounts or {},
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
        fisher=fisher,
        notes=notes,
    )
