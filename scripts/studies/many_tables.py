"""What the study of many concepts found, as tables."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sa_diffusers.report.tables import markdown_table
from studies.many_bars import Judged, attack_of, verdicts, worst_of
from studies.many_rows import COMPOSED


LAST = ("open", "H_o")


def tables(found: Mapping[str, Mapping[str, Judged]]) -> str:
    """Markdown: of every row the end, what it must show, then after each request, and each composition; means over
    the seeds."""
    ends = {n: [runs[-1] for runs in seeds.values()] for n, seeds in found.items() if not n.startswith("composed")}
    parts = [part for part in (_table("row", ends) if ends else "", verdicts(found)) if part]
    turns = {name: seeds for name, seeds in found.items() if name.startswith("in turn")}
    for name, seeds in turns.items():
        steps = zip(*seeds.values(), strict=False)
        parts.append(f"**{name}**\n\n" + _table("after", {one[0]["request"]: one for one in steps}))
    for name in (name for name in ("composed", COMPOSED) if name in found):
        steps = zip(*found[name].values(), strict=True)
        parts.append(f"**{name}**\n\n" + _table("adapters", {one[0]["adapters"]: one for one in steps}))
    return "\n\n".join(parts) + "\n"


def _table(first: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line each, with means over its judgements; of the concepts the worst, by its mean, which is named."""
    lines = []
    for name, judged in rows.items():
        cells = [_worst(judged, "seen"), _worst(judged, "unseen")]
        cells += [f"{fmean(one[key] for one in judged):.3f}" for key in ("kept", "kept worst")]
        parts = judged[0]["attributes"] or {}
        cells.append(" / ".join(f"{fmean(one['attributes'][part] for one in judged):.2f}" for part in parts) or "–")
        cells += [f"{fmean(one[key] for one in judged):.3f}" for key in LAST]
        lines.append([name, len(judged), *cells, _attacked(judged), f"{fmean(one['seconds'] for one in judged):.0f}"])
    columns = ("seeds", "worst seen", "worst unseen", "kept", "kept worst", "attributes", *LAST, "attacked", "seconds")
    return markdown_table((first, *columns), lines)


def _attacked(judged: Sequence[Mapping[str, Any]]) -> str:
    """Of the concepts that were searched for the worst, which are named; where none was chosen so, the first one."""
    value = attack_of(judged)
    if value is not None:
        worst = dict.fromkeys(max(one["attacks"], key=one["attacks"].__getitem__) for one in judged)
        return f"{value:.3f} ({', '.join(worst)})"
    known = [one["attacked"] for one in judged if "attacked" in one]
    return f"{fmean(known):.3f}" if known else ""


def _worst(judged: Sequence[Mapping[str, Any]], key: str) -> str:
    value, name = worst_of(judged, key)
    return f"{value:.3f} ({name})"
