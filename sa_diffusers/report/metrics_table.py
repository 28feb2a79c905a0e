"""The table of metrics.json: what each number is called, how it is printed, and what it says."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.report.page import TEMPLATES
from sa_diffusers.report.tables import aligned, measured
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


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """What says something of the change, as table lines: known keys first, then others under their own names.

    Args:
        metrics: {"before": {key: value}, "after": {...}} with values that are numbers, None, or dicts of them (a line
            each), and optionally "intervals": {"before": {key: [low, high]}, "after": {...}} and "attribute", the
            classifier's that the concept is a class of.
    """
    known = TABLES["change"] | TABLES["by_class"] | TABLES["constant"]
    own = {key: [key, ".4g", ""] for side in ("before", "after") for key in metrics[side] if key not in known}
    return _rows(metrics, TABLES["change"] | own)


def class_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """The same for each class that should have stayed."""
    return _rows(metrics, TABLES["by_class"])


def constant_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """What the numbers are measured by, which forgetting does not change."""
    return _rows(metrics, TABLES["constant"])


def _rows(metrics: Mapping[str, Any], of: Mapping[str, Sequence[str]]) -> list[MetricRow]:
    intervals, rows = metrics.get("intervals", {}), []
    sides = [(metrics[side], intervals.get(side, {})) for side in ("before", "after")]
    others = others_of(metrics.get("attribute"))
    for key, (label, spec, explanation) in of.items():
        nested = [values[key] for values, _ in sides if isinstance(values.get(key), Mapping)]
        parts = dict.fromkeys(part for values in nested for part in values)
        label, explanation = (
            text.replace("{others}", others).replace("{Others}", others.capitalize()) for text in (label, explanation)
        )
        for part in parts or [None]:
            if all(_part(values, key, part) is None for values, _ in sides):
                continue  # nothing was measured, as without a classifier
            cells = [measured(_part(values, key, part), _part(bounds, key, part), spec) for values, bounds in sides]
            rows.append(MetricRow(label if part is None else f"{label}: {part}", explanation, *cells))
    return rows


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The table of `metric_rows` as aligned plain text for a terminal, without the explanations."""
    return aligned([("", "before", "after"), *((row.label, row.before, row.after) for row in metric_rows(metrics))])
