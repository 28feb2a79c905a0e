"""The table of metrics.json: what each number is called, how it is printed, and what it says."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.report.page import TEMPLATES
from sa_diffusers.report.tables import aligned, cell, measured
from sa_diffusers.report.verdict import others_of


# {key in metrics.json: [label, format, what it says]} of each table.
TABLES: dict[str, dict[str, list[str]]] = read_yaml(TEMPLATES / "metrics.yaml")


class MetricRow(NamedTuple):
    """One line of the table, ready to print."""

    label: str
    explanation: str
    before: str
    after: str


def _part(values: Mapping[str, Any], key: str, part: str | None) -> Any:
    """values[key], or values[key][part] where that is a dict; None where there is none."""
    value = values.get(key)
    return value.get(part) if isinstance(value, Mapping) else value


def metric_rows(metrics: Mapping[str, Any], table: str = "change") -> list[MetricRow]:
    """What was measured, as lines of a table.

    Args:
        metrics: {"before": {key: value}, "after": {...}} with values that are numbers, None, or dicts of them (a line
            each), and optionally "intervals": {"before": {key: [low, high]}, "after": {...}} and "attribute", the
            classifier's that the concept is a class of.
        table: "change", what says something of it, with unknown keys last under their own names; "by_class", of each
            class that should have stayed; or "constant", what forgetting does not change.
    """
    of = TABLES[table]
    if table == "change":
        known = {key for name in ("change", "by_class", "constant") for key in TABLES[name]}
        of = of | {k: [_group(k), ".4g", ""] for side in ("before", "after") for k in metrics[side] if k not in known}
    intervals, rows = metrics.get("intervals", {}), []
    sides = [(metrics[side], intervals.get(side, {})) for side in ("before", "after")]
    others = others_of(metrics.get("attribute"))
    for key, (label, spec, explanation) in of.items():
        nested = [values[key] for values, _ in sides if isinstance(values.get(key), Mapping)]
        parts = dict.fromkeys(part for values in reversed(nested) for part in values)  # as after: the worst first
        label, explanation = (
            text.replace("{others}", others).replace("{Others}", others.capitalize()) for text in (label, explanation)
        )
        for part in parts or [None]:
            if part == "num_images" or all(_part(values, key, part) is None for values, _ in sides):
                continue  # a count that the page gives by itself; or nothing was measured, as without a classifier
            named, spec_of, said = TABLES["completion"].get(part, [part, spec, explanation])
            cells = [measured(_part(values, key, part), _part(bounds, key, part), spec_of) for values, bounds in sides]
            if key == "retained_worst_accuracy":
                cells = [text + _worst_of(values) for text, (values, _) in zip(cells, sides, strict=True)]
            rows.append(MetricRow(label if part is None else f"{label}: {named}", said, *cells))
    return rows


def _worst_of(values: Mapping[str, Any]) -> str:
    """The class that fares worst, in brackets; nothing where classes are not told apart."""
    found = values.get("retained_accuracy_by_class")
    return f" ({min(found, key=found.__getitem__)})" if found else ""


def _group(key: str) -> str:
    """What pictures are called that a model completes, such as "Other pictures, ring" of "third, ring"."""
    name, comma, mask = key.partition(",")
    return TABLES["groups"].get(name, [name])[0] + comma + mask


def request_table(requests: Sequence[Mapping[str, Any]], attribute: str | None) -> tuple[list[str], list[list[str]]]:
    """What was forgotten when, by what, and what was found of it and of the rest then: header and rows of a table.

    Args:
        requests: "concept", "date" and "method" of each, None where it is not known, and numbers as of metrics.json,
            the oldest first.
        attribute: as of `metric_rows`.
    """
    others = others_of(attribute).capitalize()
    numbers = {
        key: (label.replace("{Others}", others).replace("{others}", others_of(attribute)), spec)
        for key, (label, spec, _) in TABLES["change"].items()
        if any(isinstance(one.get(key), float) for one in requests)
    }
    header = ["After forgetting", "date", "by", *(label for label, _ in numbers.values())]
    said = [[cell(one[name]) for name in ("concept", "date", "method")] for one in requests]
    found = [[cell(one.get(key), spec) for key, (_, spec) in numbers.items()] for one in requests]
    return header, [[*words, *values] for words, values in zip(said, found, strict=True)]


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The table of `metric_rows` as aligned plain text for a terminal, without the explanations."""
    return aligned([("", "before", "after"), *((row.label, row.before, row.after) for row in metric_rows(metrics))])
