"""From one number a picture to means with intervals, differences to the reference, and tables."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa_diffusers.evaluation.intervals import difference_interval, mean_interval, share_interval
from sa_diffusers.evaluation.judging import Values, worst_class
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.evaluation.suite.prompt_suite import WHAT
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.report.page import TEMPLATES
from sa_diffusers.report.tables import aligned, bracket, markdown_table


MEASURES: dict[str, list[str]] = read_yaml(TEMPLATES / "measures.yaml")  # {measure: [label, format, what it says]}
# What the result in a sentence says of a purpose: where, and the first of the measures that was taken.
SAID = {
    "asks": (
        "where {concept} is asked for", ("concept_probability", "clip_concept", "identity", "exposed", "clip_score")
    ),
    "i2p": ("in the pictures of I2P", ("exposed",)),
    "keeps": (
        "where something else must stay",
        ("accuracy", "clip_accuracy", "attributes", "clip_score", "exposed", "pixel_change"),
    ),
}  # fmt: skip
GROUPS = {"asks": "all that ask for the concept", "keeps": "all that must stay"}


@dataclass(frozen=True)
class Measurement:
    """A mean over pictures.

    Attributes:
        group: the set of prompts, or one of `GROUPS`.
        value, interval, num_images: the mean, its 95 % interval (None: none is taken, or it is of one picture) and of
            how many.
        difference, difference_interval: to the reference, over the pictures that both have a value for; None of the
            reference itself, and where it has none.
        remark: such as which class is the worst.
    """

    group: str
    measure: str
    value: float
    interval: tuple[float, float] | None
    num_images: int
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    remark: str = ""


def measurements(
    suite: Mapping[str, PromptSet], values: Values, reference: Values | None, attribute: str | None
) -> list[Measurement]:
    """Every measure of every set, and of all sets of a purpose together.

    Intervals group the pictures of one prompt, as `PromptSet.groups` does.

    Args:
        reference: the reference's values; None: these are its own.
        attribute: the classifier's that the concept is a class of, for the worst class.
    """
    found = []
    for group, names in groups(suite).items():
        whole = sum((suite[name] for name in names[1:]), suite[names[0]])
        alike, classes = whole.groups(attribute), [labels.get(attribute) for labels in whole.labels]
        own, before = pooled(values, suite, names), pooled(reference or {}, suite, names)
        for measure in (name for name in MEASURES if name in own):
            pair = own[measure], before.get(measure)
            rows = pair[0].isfinite().nonzero()[:, 0].tolist()
            if not rows:
                continue
            found.append(_measured(group, measure, rows, pair, alike))
            if measure == "accuracy" and attribute is not None:  # the interval is of this class alone
                name, rows = worst_class(pair[0], classes)
                # No difference: a class that was chosen for being the worst has lost by that choice.
                worst = _measured(group, "worst_accuracy", rows, (pair[0], None), alike)
                found.append(replace(worst, remark=name or ""))
    return found


def _measured(
    group: str,
    measure: str,
    rows: Sequence[int],
    values: tuple[Tensor, Tensor | None],
    alike: Sequence[Hashable],
) -> Measurement:
    """The mean of the rows, and its difference to the reference's (the second of `values`) where both have one."""
    own, before = values
    interval = share_interval if MEASURES[measure][1].endswith("%") else mean_interval
    interval = interval(own[rows], groups=[alike[row] for row in rows])
    mean = Measurement(group, measure, own[rows].mean().item(), interval, len(rows))
    both = [] if before is None else [row for row in rows if before[row].isfinite()]
    if not both:
        return mean
    bounds = difference_interval(own[both], before[both], groups=[alike[row] for row in both])
    return replace(mean, difference=(own[both] - before[both]).mean().item(), difference_interval=bounds)


def groups(suite: Mapping[str, PromptSet]) -> dict[str, list[str]]:
    """The sets behind each row of numbers: all of a purpose where there are several, then each by itself."""
    by_purpose = {title: [n for n, s in suite.items() if s.purpose == purpose] for purpose, title in GROUPS.items()}
    return {title: names for title, names in by_purpose.items() if len(names) > 1} | {name: [name] for name in suite}


def pooled(values: Values, suite: Mapping[str, PromptSet], names: Sequence[str]) -> dict[str, Tensor]:
    """The measures of several sets in a row: [N of all], NaN for pictures that have none."""
    measures = dict.fromkeys(measure for name in names for measure in values.get(name, {}))
    missing = {name: torch.full((len(suite[name]),), torch.nan, dtype=torch.float64) for name in names}
    return {m: torch.cat([values.get(name, {}).get(m, missing[name]) for name in names]) for m in measures}


@dataclass(frozen=True)
class Table:
    """Numbers of one group: pipelines as rows, measures as columns; a cell is None where nothing was measured."""

    title: str
    columns: list[str]  # labels
    rows: list[tuple[str, list[Measurement | None]]]


def tables(
    results: Mapping[str, Sequence[Measurement]], suite: Mapping[str, PromptSet]
) -> tuple[list[Table], list[Table]]:
    """The tables of what belongs together, and those of the single sets that are part of it.

    Args:
        results: by pipeline, the reference first.
    """
    parts = {name for title, names in groups(suite).items() if title in GROUPS.values() for name in names}
    whole: tuple[list[Table], list[Table]] = [], []
    for group in dict.fromkeys(m.group for rows in results.values() for m in rows):
        cells = {name: {m.measure: m for m in rows if m.group == group} for name, rows in results.items()}
        present = dict.fromkeys(measure for row in cells.values() for measure in row)
        order = [*filter(present.__contains__, MEASURES), *(m for m in present if m not in MEASURES)]
        title = f"{group}: {WHAT[group]}" if group in WHAT else group
        rows = [(name, [row.get(measure) for measure in order]) for name, row in cells.items()]
        whole[group in parts].append(Table(title, [MEASURES.get(m, (m,))[0] for m in order], rows))
    return whole


def cell(measured: Measurement | None) -> list[str]:
    """A cell in up to three parts: value and remark, interval and number of pictures, difference with its interval."""
    if measured is None:
        return ["–"]
    spec = MEASURES[measured.measure][1] if measured.measure in MEASURES else ".4g"
    parts = [f"{measured.value:{spec}}" + (f" ({measured.remark})" if measured.remark else "")]
    interval = "" if measured.interval is None else f"{bracket(measured.interval, spec)}, "
    parts.append(f"{interval}n = {measured.num_images:,}")
    if measured.difference is not None:
        points = spec.endswith("%")  # a difference of shares is in points: 5 % less could mean a twentieth less
        factor, signed = (100, "+.1f") if points else (1, f"+{spec}")
        ends = [factor * bound for bound in measured.difference_interval or ()]
        bounds = f" {bracket(ends, signed)}" if ends else ""
        parts.append(f"{factor * measured.difference:{signed}}{bounds}" + (" points" if points else ""))
    return parts


def summary(shown: Sequence[Table]) -> str:
    """Tables for the terminal: a line each measure and pipeline."""
    lines = []
    for table in shown:
        rows = [(column, name, *cell(row[i])) for i, column in enumerate(table.columns) for name, row in table.rows]
        lines += [table.title, aligned(rows), ""]
    return "\n".join(lines).strip()


def markdown(shown: Sequence[Table], title: str, notes: Sequence[str]) -> str:
    """Tables as a Markdown page."""
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    for table in shown:
        rows = [[name, *("<br>".join(cell(measured)) for measured in row)] for name, row in table.rows]
        lines += [f"## {table.title}", "", markdown_table(["pipeline", *table.columns], rows), ""]
    return "\n".join(lines)


def headline(results: Mapping[str, Sequence[Measurement]], suite: Mapping[str, PromptSet], concept: str) -> list[str]:
    """A sentence for each pipeline that is compared with the reference, or for the only one; [] of no such measure.

    Args:
        results: by pipeline, the reference first.
    """
    values = {name: {(m.group, m.measure): m.value for m in rows} for name, rows in results.items()}
    reference, *others = values
    sentences = []
    for name in others or [reference]:
        own, before, clauses = values[name], values[reference] if others else {}, []
        for purpose, (where, said) in SAID.items():
            names = [set_name for set_name, part in suite.items() if part.purpose == purpose]
            group = GROUPS[purpose] if len(names) > 1 else names[0] if names else ""
            measure = next((measure for measure in said if (group, measure) in own), None)
            if measure is not None:
                key, (label, spec, _) = (group, measure), MEASURES[measure]
                became = f"went from {before[key]:{spec}} to" if key in before else "is"
                parts = [f"{part} {own[part, measure]:{spec}}" for part in names if (part, measure) in own]
                apart = f" ({', '.join(parts)})" if purpose == "keeps" and len(parts) > 1 else ""
                clauses.append(f"{where.format(concept=f'“{concept}”')}, {label} {became} {own[key]:{spec}}{apart}")
        if clauses:
            sentences.append(f"{name}: {'; '.join(clauses)}.")
    return sentences
