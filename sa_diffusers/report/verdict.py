"""What the numbers of a run come to, in one line: by their intervals, and never more than these say."""

from collections.abc import Iterator, Mapping
from typing import Any

from sa_diffusers.report.tables import measured


SHOWN = 0.1  # a concept whose probability surely is at most this counts as forgotten
ASKED = {"asked for": "concept_probability", "asked for in unseen words": "concept_probability_unseen"}
KEPT_PICTURES = {"retain": "pictures to retain", "third": "pictures of neither kind"}
PREFERRED = "concept_preference"
SIDES = ("before", "after")
Advice = tuple[str, str]  # what to try where a run was too weak, and where it was too strong


def others_of(attribute: str | None) -> str:
    """What is to be kept, in words: "the other digits" of the attribute "digit"."""
    if attribute is None:
        return "everything else"
    ending = "es" if attribute.endswith(("s", "x", "ch", "sh")) else "s"
    plural = attribute[:-1] + "ies" if attribute.endswith("y") else attribute + ending
    return f"the other {plural.replace('_', ' ')}"


def verdict(metrics: Mapping[str, Any], remedies: Advice) -> tuple[str, str]:
    """The verdict, and what to try next ("" where nothing is to be tried).

    A concept is forgotten where the upper ends of all its intervals are at most `SHOWN`, or so much above what the
    judge says of pure noise where it was led there; not forgotten where any lower end is above that. Of several the
    one that is left most decides, and is named.

    Args:
        metrics: metrics.json of a run; "judged_by" where no classifier judged, but something that chose between the
            concept and what takes its place: {"name", "instead"}.
        remedies: options to change, in words that complete "try ...".
    """
    after, intervals = metrics["after"], metrics.get("intervals", {}).get("after", {})
    if "forget" in after:
        return completion_verdict(metrics, remedies)
    judge = metrics.get("judged_by")
    keys = {"asked for": PREFERRED} if judge else ASKED
    asked = [
        (value, *bounds, what, name)
        for what, key in keys.items()
        for name, value, bounds in _each_concept(after, intervals, key)
    ]
    if not asked:
        return (
            "Not judged: no classifier has read the pictures.",
            "Look at them, or pass a --classifier.",
        )
    who = judge["name"] if judge else "the classifier"
    noise = after.get("noise_preference" if judge else "noise_probability") or 0.0
    limit = SHOWN + (noise if metrics.get("surrogate") == "noise" else 0.0)
    if limit > 3 * SHOWN:
        said = f"Not judged: {who} takes pure noise for it with {noise:.1%}."
        return said, f"Look at the pictures, or pass {'a' if judge else 'another'} --classifier."
    highest, lowest = max(asked, key=lambda found: found[2]), max(asked, key=lambda found: found[1])
    outcome, shown = "Not clearly forgotten", highest
    if highest[2] <= limit:
        outcome = "Forgotten"
    elif lowest[1] > limit:
        outcome, shown = "Not forgotten", lowest
    value, low, high, what, name = shown
    it = f"“{name}”" if name else "it"
    if judge:
        those = f"{measured(value, (low, high))} of the pictures that ask for it"
        said = f"{outcome}: {who} prefers {it} to {judge['instead']} in {those}."
    else:
        said = f"{outcome}: {what}, {it} shows with {measured(value, (low, high))}."
    lost, clearly = damage(metrics)
    if high > limit and value > limit:
        advice = f"Too weak: try {remedies[0]}."
    elif high > limit:
        more = "judge by more pictures, of more prompts (--eval_images_concept, --eval_images_other)"
        advice = f"Undecided: {'look at the pictures, or pass a --classifier' if judge else more}."
    else:
        advice = f"Too strong: try {remedies[1]}." if clearly else ""
    return f"{said} {lost}".strip(), advice


def _each_concept(
    after: Mapping[str, Any], intervals: Mapping[str, Any], key: str
) -> Iterator[tuple[str, float, tuple[float, float]]]:
    """Name, value and interval of every concept; of one alone, which is not named, ""."""
    several = f"{key}_by_concept"
    if intervals.get(several):
        yield from ((name, after[several][name], bounds) for name, bounds in intervals[several].items())
    elif intervals.get(key):
        yield "", after[key], intervals[key]


def completion_verdict(metrics: Mapping[str, Any], remedies: Advice) -> tuple[str, str]:
    """As `verdict`, of a model that completes pictures: by its errors in the holes, and by a new decoder."""
    sides, bounds = (metrics["before"], metrics["after"]), metrics["intervals"]

    def change(group: str, key: str = "masked_mse") -> tuple[str, bool]:
        """An error in words, and whether it has surely risen."""
        was, now = (side[group][key] for side in sides)
        first, last = (bounds[side][group][key] for side in ("before", "after"))  # None of a single picture
        return f"{measured(now, last, '.3g')} (before: {was:.3g})", bool(first and last) and last[0] > first[1]

    said, worse = change("forget")
    found = [f"{'Forgotten' if worse else 'Not clearly forgotten'}: error in the holes of pictures to forget {said}."]
    lost = [
        f"Damage: of {what} {change(group)[0]}."
        for group, what in KEPT_PICTURES.items()
        if group in sides[1] and change(group)[1]
    ]
    told, erased = change("fresh_decoder")
    found += lost
    if not erased:
        found.append(
            f"Not erased against a new decoder: one fitted to the encoder's features leaves an error of {told}."
        )
    advice = f"Too weak: try {remedies[0]}." if not worse else f"Too strong: try {remedies[1]}." if lost else ""
    return " ".join(found), advice


def damage(metrics: Mapping[str, Any]) -> tuple[str, bool]:
    """What was lost of all others, if that is sure, and of the class that lost most; and whether any of it is sure.

    Sure is what has intervals apart. Each number stands with its own: the difference of a class that was chosen for it
    has none.
    """
    found, any_sure = [], False
    before, after = (metrics[side].get("retained_accuracy_by_class") or {} for side in SIDES)
    lost = {name: value - after.get(name, value) for name, value in before.items()}
    worst = max(lost, key=lambda name: lost[name], default=None)
    for lead, part in ((f"Of {others_of(metrics.get('attribute'))} ", None), (f"Worst damage: {worst}, ", worst)):
        (was, earlier), (now, later) = (_of(metrics, side, part) for side in SIDES)
        sure = bool(earlier and later and later[1] < earlier[0])
        if sure or (part is not None and lost[part] > 0):
            right, chance = (" came out right" if part is None else ""), ("" if sure else " (may be chance)")
            found.append(f"{lead}{measured(was, earlier)}{right} before, {measured(now, later)} after{chance}.")
        any_sure |= sure
    return " ".join(found), any_sure


def _of(metrics: Mapping[str, Any], side: str, name: str | None) -> tuple[Any, Any]:
    """How many pictures of a class, or of all that stay, came out right, and the interval; None where not measured."""
    values, bounds = metrics[side], metrics.get("intervals", {}).get(side, {})
    if name is None:
        return values.get("retained_accuracy"), bounds.get("retained_accuracy")
    key = "retained_accuracy_by_class"
    return values[key].get(name), (bounds.get(key) or {}).get(name)
