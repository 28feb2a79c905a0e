"""What the study of many concepts must show, beside what it found."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from sa_diffusers.report.tables import markdown_table
from studies.many_cost import SHARED
from studies.many_rows import COMPOSED, DIGITS


Judged = list[dict[str, Any]]  # what each pipeline of a row was found to do
Found = Mapping[str, Mapping[str, Judged]]
EDITS = ("uce", "speed")  # rivals, by how the names of their rows begin
LEFT, KEPT, BEHIND, OPEN, TIMES, LOST = 0.02, 0.985, -0.005, 0.3, 2.0, 0.015


def verdicts(found: Found) -> str:
    """Markdown: a line a row of the study, the bars in its columns; what is missed is said, "–" was not measured."""
    parts = [_at_once(found), _in_turn(found), _composed(found)]
    return "\n\n".join(part for part in parts if part)


def worst_of(judged: Sequence[Mapping[str, Any]], *keys: str) -> tuple[float, str]:
    """Of the concepts the one that is worst by its mean over judgements: that mean, and its name."""
    means = [(fmean(one[key][name] for one in judged), name) for key in keys for name in judged[0][key]]
    return max(means, key=lambda one: one[0])


def attack_of(judged: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the concepts that were searched for in each the one that came back most; None: a judgement has none."""
    found = [one.get("attacks") for one in judged]
    return fmean(max(one.values()) for one in found) if all(found) else None


def times(judged: Judged, one: Judged) -> float:
    """Seconds of what is new in a run at once, what serves every run of the model apart, as a share of another's."""
    whole = all("stages" in run for run in (*judged, *one))  # else of surrogate pictures and training

    def seconds(runs: Judged) -> float:
        parts = [run["stages"] if whole else {"": run["seconds"]} for run in runs]
        return fmean(sum(s for stage, s in part.items() if stage not in SHARED) for part in parts)

    return seconds(judged) / max(seconds(one), 1e-9)


def rest_lost(composed: Mapping[str, Judged], adapters: str) -> tuple[float, str]:
    """How much more of the rest some adapters lose than each of them alone, on the digits that they all keep.

    Args:
        composed: judgements of each of the composed, over the seeds, by its adapters.

    Returns:
        The largest difference of the means over these digits, and the digit that loses most with that difference.
    """

    def right(judged: Judged, digit: str) -> float:
        return fmean(one["rest"][digit] for one in judged)

    names, own = adapters.partition(",")[0].split(), composed[adapters]
    kept = own[0]["rest"]
    lost = {name: {digit: right(composed[name], digit) - right(own, digit) for digit in kept} for name in names}
    most, digit = max((lost[name][digit], digit) for name in names for digit in kept)
    return max(fmean(one.values()) for one in lost.values()), f"{digit} {most:.3f}"


def _said(value: float | None, bar: float, least: bool = False, strict: bool = False) -> str:
    if value is None:
        return "–"
    holds = value >= bar if least else value < bar if strict else value <= bar
    return f"{value:z.3f}" + ("" if holds else " missed")


def _at_once(found: Found) -> str:
    ends = {name: [runs[-1] for runs in seeds.values()] for name, seeds in found.items()}
    ends = {name.removeprefix("at once, "): judged for name, judged in ends.items() if name.startswith("at once, ")}
    lines = []
    for name, judged in ends.items():
        what, _, kind = name.partition(": ")
        if kind == "original" or kind.startswith(EDITS):
            continue
        edits = [own for other, own in ends.items() if other.startswith(tuple(f"{what}: {edit}" for edit in EDITS))]
        attack, attacks = attack_of(judged), [attack_of(own) for own in edits]
        lines.append([
            f"at once, {name}",
            _said(worst_of(judged, "unseen")[0], LEFT),
            _said(_mean(judged, "kept"), KEPT, least=True),
            _said(_less(_mean(judged, "H_o"), [_mean(own, "H_o") for own in edits], max), BEHIND, least=True),
            _said(_share(judged, ends.get(f"{what}: original")), OPEN),
            _said(None if attack is None else _less(attack, attacks, min), 0.0, strict=True),
            _said(times(judged, one) if (one := ends.get(f"1: {kind}")) else None, TIMES),
        ])  # fmt: skip
    columns = (
        "row", f"worst unseen, ≤ {LEFT:g}", f"kept, ≥ {KEPT:g}", f"H_o less the best edit's, ≥ {BEHIND:g}",
        f"open, of the original's, ≤ {OPEN:g}", "attacked less the lowest edit's, < 0",
        f"seconds, of one concept's, ≤ {TIMES:g}",
    )  # fmt: skip
    return markdown_table(columns, lines) if lines else ""


def _in_turn(found: Found) -> str:
    original, lines = found.get("at once, 6: original", {}), []
    for name, seeds in found.items():
        if not name.startswith("in turn"):
            continue
        steps = list(zip(*seeds.values(), strict=False))
        share = _share(steps[-1], [runs[-1] for runs in original.values()]) if len(steps) == len(DIGITS) else None
        costs = [_cost(step) for step in steps]
        added = max(costs[1:]) / costs[0] if len(costs) > 1 and None not in costs else None
        lines.append([
            name,
            _said(min(_mean(step, "kept") for step in steps), KEPT, least=True),
            _said(max(worst_of(step, "seen", "unseen")[0] for step in steps), LEFT),
            _said(worst_of(steps[-1], "seen", "unseen")[0], LEFT),
            _said(share, OPEN),
            _said(added, 1.0),
            "–" if added is None else ", ".join(dict.fromkeys(_anew(steps[1:]))) or "nothing",
        ])  # fmt: skip
    columns = (
        "row", f"kept after any request, ≥ {KEPT:g}", f"worst after any, ≤ {LEFT:g}", f"after the last, ≤ {LEFT:g}",
        f"open, of the original's, ≤ {OPEN:g}", "seconds of the dearest added, of the first's, ≤ 1", "made anew",
    )  # fmt: skip
    return markdown_table(columns, lines) if lines else ""


def _composed(found: Found) -> str:
    if COMPOSED not in found:
        return ""
    steps = {one[0]["adapters"]: list(one) for one in zip(*found[COMPOSED].values(), strict=True)}
    lines = []
    for name, judged in steps.items():
        if " " in name and "," not in name:
            lost, digit = rest_lost(steps, name)
            left, which = worst_of(judged, "unseen")
            lines.append([name, f"{_said(left, LEFT)} ({which})", f"{_said(lost, LOST)} (most: {digit})"])
    columns = ("adapters", f"worst unseen, ≤ {LEFT:g}", f"rest lost, against each alone, ≤ {LOST:g}")
    return markdown_table(columns, lines) if lines else ""


def _mean(judged: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(one[key] for one in judged)


def _less(value: float, others: Sequence[float | None], best: Callable) -> float | None:
    """A value without the best of the others that were measured; None: none was."""
    there = [one for one in others if one is not None]
    return value - best(there) if there else None


def _share(judged: Sequence[Mapping[str, Any]], original: Sequence[Mapping[str, Any]] | None) -> float | None:
    return _mean(judged, "open") / max(_mean(original, "open"), 1e-9) if original else None


def _cost(step: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a request: every stage that it made, the first one's with samples and Fisher; None: not measured."""
    return fmean(sum(one["stages"].values()) for one in step) if all("stages" in one for one in step) else None


def _anew(steps: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """What serves all requests, and was made again after the first."""
    return [name for name in SHARED for step in steps if any(name in one["stages"] for one in step)]
