"""The page of a run: pictures before and after, curves, a table of metrics, times, and what it was told."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_diffusers.report.curves import curves_png
from sa_diffusers.report.metrics_table import metric_rows
from sa_diffusers.report.page import write_page
from sa_diffusers.report.pictures import by_group, data_uri, figure


def write_report(
    path: str | Path,
    *,
    metrics: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    amounts: Mapping[str, Mapping[str, Any]] | None = None,
    **said: Any,
) -> None:
    """Write one HTML page that needs nothing else: no network, no script, pictures inside.

    Args:
        metrics: see `metric_rows`.
        pairs, history: see `save_before_after` and `curves_png`; may be empty.
        config: the resolved configuration.
        amounts: {stage: {"count", "of", "per_second"}}, what each stage worked through.
        said: title; verdict, advice: of `verdict`; summary, what was done, in words; seconds, of wall-clock by stage,
            where a list under "reused" names those that were not computed again; fisher, its metadata or None; notes,
            one sentence each.
    """
    groups = {
        name: [
            figure(pair.get("beside", {}) | {side: pair[side] for side in ("before", "after")}, pair["prompt"])
            for pair in part
        ]
        for name, part in by_group(pairs).items()
    }
    write_page(
        path,
        "report.html.j2",
        rows=metric_rows(metrics),
        with_intervals="intervals" in metrics,
        groups=groups,
        curves={theme: data_uri(curves_png(history, theme == "dark")) for theme in ("light", "dark")},
        history=history,
        amounts=amounts or {},
        config=json.dumps(config, indent=2, ensure_ascii=False, default=str),
        **said,
    )
