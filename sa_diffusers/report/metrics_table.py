"""The table of metrics.json: what each number is called, how it is printed, and what it says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sa_diffusers.report.tables import aligned, measured
from sa_diffusers.report.verdict import others_of


# key in metrics.json: (label, format, what it says). Rates are fractions of 1, shown in per cent.
METRICS = {
    "concept_probability": ("Concept when asked for", ".1%", "Its probability in pictures that ask for it."),
    "concept_probability_unseen": ("Concept, unseen phrasings", ".1%", "The same for words the forgetting never saw."),
    "concept_probability_by_concept": ("Asked for", ".1%", "The same of each concept, the worst first."),
    "concept_probability_unseen_by_concept": ("In unseen phrasings", ".1%", "The same of each concept."),
    "concept_preference": (
        "Concept preferred",
        ".1%",
        "Share of the pictures that ask for it which the judge takes for it rather than for what takes its place.",
    ),
    "concept_preference_by_concept": ("Preferred", ".1%", "The same of each concept, the worst first."),
    "concept_rate_when_unnamed": ("Concept when not named", ".1%", "Share of pictures that show it all the same."),
    "concept_entropy": ("Entropy when asked for (nats)", ".3f", "How undecided the classifier is about them."),
    "retained_accuracy": ("{Others}", ".1%", "Share of pictures of {others} that show what was asked for."),
    "retained_worst_accuracy": ("Worst of {others}", ".1%", "The same for the class that fares worst."),
    "retained_probability": ("Probability, {others}", ".1%", "Of the class that was asked for."),
    "retained_worst_probability": (
        "Probability, worst of {others}", ".1%", "The same for the class that fares worst."
    ),
    "attribute_accuracy": ("Attributes", ".1%", "Share of pictures with the attribute that was asked for."),
    "concept_attribute_accuracy": (
        "Attributes, concept asked for",
        ".1%",
        "The same where the forgotten word is asked for.",
    ),
    "replay_loss": ("Loss on replay samples", ".4f", "Denoising error on the model's own samples of {others}."),
}  # fmt: skip
BY_CLASS = {"retained_accuracy_by_class": ("Shown as asked for", ".1%", "")}
# The same before and after: what the numbers are measured by.
CONSTANTS = {
    "noise_probability": (
        "Concept in pure noise",
        ".1%",
        "The classifier's answer to noise: compare the above with it where noise is the surrogate.",
    ),
    "noise_preference": ("Concept preferred in pure noise", ".1%", "The judge's answer to noise."),
    "noise_entropy": ("Entropy of pure noise (nats)", ".3f", "How undecided the classifier is about noise."),
    "grey_probability": ("Concept in flat grey", ".1%", "The classifier's answer to a picture without any content."),
    "grey_entropy": ("Entropy of flat grey (nats)", ".3f", "How undecided the classifier is about it."),
    "classifier_accuracy": ("Classifier", ".1%", "Its accuracy on real pictures: how far to trust the rest."),
    "num_images": ("Pictures drawn", ",.0f", "Generated pictures behind these numbers, before and again after."),
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


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """What says something of the change, as table lines: known keys first, then others under their own names.

    Args:
        metrics: {"before": {key: value}, "after": {...}} with values that are numbers, None, or dicts of them (a line
            each), and optionally "intervals": {"before": {key: [low, high]}, "after": {...}} and "attribute", the
            classifier's that the concept is a class of.
    """
    own = {key: (key, ".4g", "") for side in ("before", "after") for key in metrics[side]}
    return _rows(metrics, {**METRICS, **{key: own[key] for key in own if key not in METRICS | BY_CLASS | CONSTANTS}})


def class_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """The same for each class that should have stayed."""
    return _rows(metrics, BY_CLASS)


def constant_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """What the numbers are measured by, which forgetting does not change."""
    return _rows(metrics, CONSTANTS)


def _rows(metrics: Mapping[str, Any], of: Mapping[str, tuple[str, str, str]]) -> list[MetricRow]:
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
            if all(_part(values, key, part) is None for values, _ in sides):
                continue  # nothing was measured, as without a classifier
            cells = [measured(_part(values, key, part), _part(bounds, key, part), spec) for values, bounds in sides]
            rows.append(MetricRow(label if part is None else f"{label}: {part}", explanation, *cells))
    return rows


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The table of `metric_rows` as aligned plain text for a terminal, without the explanations."""
    return aligned([("", "before", "after"), *((row.label, row.before, row.after) for row in metric_rows(metrics))])
