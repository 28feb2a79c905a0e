"""What the study of many concepts found, as tables."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sa_diffusers.report.tables import markdown_table


LAST = ("open", "H_o", "attacked")
Judged = list[dict[str, Any]]  # what each pipeline of a row was found to do


def tables(found: Mapping[str, Mapping[str, Judged]]) -> str:
    """Markdown: of every row the end, then after each request, and each composition; means over the seeds."""
    ends = {name: [runs[-1] for runs in seeds.values()] for name, seeds in found.items() if name != "composed"}
    parts = [_table("row", ends)] if ends else []
    turns = {name: seeds for name, seeds in found.items() if name.startswith("in turn")}
    for name, seeds in turns.items():
        steps = zip(*seeds.values(), strict=False)
        parts.append(f"**{name}**\n\n" + _table("after", {one[0]["request"]: one for one in steps}))
    if "composed" in found:
        steps = zip(*found["composed"].values(), strict=True)
        parts.append("**composed**\n\n" + _table("adapters", {one[0]["adapters"]: one for one in steps}))
    return "\n\n".join(parts) + "\n"


def _table(first: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line each, with means over its judgements; of the concepts the worst, by its mean, which is named."""
    lines = []
    for name, judged in rows.items():
        cells = [_worst(judged, "seen"), _worst(judged, "unseen")]
        cells += [f"{fmean(one[key] for one in judged):.3f}" for key in ("kept", "kept worst")]
        parts = judged[0]["attributes"] or {}
        cells.append(" / ".join(f"{fmean(one['attributes'][part] for one in judged):.2f}" for part in parts) or "–")
        cells += [f"{fmean(one[key] for one in judged):.3f}" if key in judged[0] else "" for key in LAST]
        lines.append([name, len(judged), *cells, f"{fmean(one['seconds'] for one in judged):.0f}"])
    columns = ("seeds", "worst seen", "worst unseen", "kept", "kept worst", "attributes", *LAST, "seconds")
    return markdown_table((first, *columns), lines)


def _worst(judged: Sequence[Mapping[str, Any]], key: str) -> str:
    means = {name: fmean(one[key][name] for one in judged) for name in judged[0][key]}
    name = max(means, key=means.__getitem__)
    return f"{means[name]:.3f} ({name})"
