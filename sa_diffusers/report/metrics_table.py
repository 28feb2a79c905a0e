"""The table of metrics.json: what each number is called, how it is printed, and what it says."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sa_diffusers.report.tables import aligned, bracket


# key in metrics.json: (label, format, what it says). Rates are fractions of 1, shown in per cent.
METRICS = {
    "concept_probability": ("Concept when asked for", ".1%", "Its probability in pictures that ask for it."),
    "concept_probability_unseen": ("Concept, unseen phrasings", ".1%", "The same for words the forgetting never saw."),
    "concept_rate_when_unnamed": ("Concept when not named", ".1%", "Share of pictures that show it all the same."),
    "concept_entropy": ("Entropy when asked for (nats)", ".3f", "How undecided the classifier is about them."),
    "noise_probability": (
        "Concept in pure noise",
        ".1%",
        "The classifier's answer to noise: compare the above with it where noise is the surrogate.",
    ),
    "noise_entropy": ("Entropy of pure noise (nats)", ".3f", "How undecided the classifier is about noise."),
    "grey_probability": ("Concept in flat grey", ".1%", "The classifier's answer to a picture without any content."),
    "grey_entropy": ("Entropy of flat grey (nats)", ".3f", "How undecided the classifier is about it."),
    "retained_accuracy": ("Retained concepts", ".1%", "Share of pictures of other concepts that show what was asked."),
    "retained_worst_accuracy": ("Worst retained concept", ".1%", "The same for the concept that fares worst."),
    "retained_probability": ("Probability of retained", ".1%", "Of the class that was asked for."),
    "retained_worst_probability": ("Probability, worst retained", ".1%", "The same for the class that fares worst."),
    "attribute_accuracy": ("Attributes", ".1%", "Share of pictures with the attribute that was asked for."),
    "concept_attribute_accuracy": (
        "Attributes, concept asked for",
        ".1%",
        "The same where the forgotten word is asked for.",
    ),
    "replay_loss": ("Loss on replay samples", ".4f", "Denoising error on the model's own samples of everything else."),
    "classifier_accuracy": ("Classifier", ".1%", "Its accuracy on real pictures: how far to trust the rest."),
    "num_images": ("Pictures drawn", ",.0f", "Generated pictures behind these numbers."),
}


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


def _cell(value: Any, interval: Sequence[float] | None, spec: str) -> str:
    """Format a value and its 95 % interval: 0.975, [0.96, 0.99] -> "97.5% [96.0%, 99.0%]"."""
    if not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:{spec}}" + (f" {bracket(interval, spec)}" if interval else "")


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """Turn metrics into table lines: known keys first, in a fixed order, then others under their own names.

    Args:
        metrics: {"before": {key: value}, "after": {...}} with values that are numbers, None, or dicts of them (a line
            each), and optionally "intervals": {"before": {key: [low, high]}, "after": {...}}.
    """
    intervals = metrics.get("intervals", {})
    sides = [(metrics[side], intervals.get(side, {})) for side in ("before", "after")]
    present = dict.fromkeys(key for values, _ in sides for key in values)
    rows = []
    for key in [*filter(present.__contains__, METRICS), *(key for key in present if key not in METRICS)]:
        label, spec, explanation = METRICS.get(key, (key, ".4g", ""))
        nested = [values[key] for values, _ in sides if isinstance(values.get(key), Mapping)]
        parts = dict.fromkeys(part for values in nested for part in values)
        for part in parts or [None]:
            if all(_part(values, key, part) is None for values, _ in sides):
                continue  # nothing was measured, as without a classifier
            cells = [_cell(_part(values, key, part), _part(bounds, key, part), spec) for values, bounds in sides]
            rows.append(MetricRow(label if part is None else f"{label}: {part}", explanation, *cells))
    return rows


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The table of `metric_rows` as aligned plain text for a terminal, without the explanations."""
    return aligned([("", "before", "after"), *((row.label, row.before, row.after) for row in metric_rows(metrics))])
