"""What the numbers of a run come to, in one line: by their intervals, and never more than these say."""

from collections.abc import Mapping
from typing import Any

from sa_diffusers.report.tables import bracket


SHOWN = 0.1  # a concept whose probability surely is at most this counts as forgotten
ASKED = {"asked for": "concept_probability", "asked for in unseen words": "concept_probability_unseen"}
KEPT_PICTURES = {"retain": "pictures to retain", "third": "pictures of neither kind"}
KEPT = {"the others": "retained_accuracy", "the worst of the others": "retained_worst_accuracy"}


def verdict(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict, and what to try next ("" where nothing is to be tried).

    A concept is forgotten where the upper ends of all its intervals are at most `SHOWN`, or so much above what the
    classifier says of pure noise where it was led there; not forgotten where any lower end is above that.

    Args:
        metrics: metrics.json of a run.
    """
    after, intervals = metrics["after"], metrics.get("intervals", {}).get("after", {})
    if "forget" in after:
        return completion_verdict(metrics)
    asked = [(after[key], *intervals[key], what) for what, key in ASKED.items() if intervals.get(key)]
    if not asked:
        return "Not judged: no classifier has read the pictures.", "Look at them, or pass one that knows the concept."
    noise = after.get("noise_probability") or 0.0
    limit = SHOWN + (noise if metrics.get("surrogate") == "noise" else 0.0)
    if limit > 3 * SHOWN:
        said = f"Not judged: the classifier takes pure noise for it with {noise:.1%}."
        return said, "Look at the pictures, or pass another --classifier."
    highest, lowest = max(asked, key=lambda found: found[2]), max(asked, key=lambda found: found[1])
    outcome, shown = "Not clearly forgotten", highest
    if highest[2] <= limit:
        outcome = "Forgotten"
    elif lowest[1] > limit:
        outcome, shown = "Not forgotten", lowest
    value, low, high, what = shown
    said = f"{outcome}: {what}, it shows with {value:.1%} {bracket((low, high), '.1%')}."
    lost = _lost(metrics)
    if high > limit and value > limit:
        advice = "Too weak: train longer or at a higher rate, or choose a nearer surrogate."
    elif high > limit:
        advice = "Undecided: judge by more pictures, of more prompts (--eval_images_concept, --eval_images_other)."
    else:
        advice = "Too strong: train less, or hold the rest by more replay and EWC." if lost else ""
    return " ".join([said, *lost]), advice


def completion_verdict(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """As `verdict`, of a model that completes pictures: by its errors in the holes, and by a new decoder."""
    sides, bounds = (metrics["before"], metrics["after"]), metrics["intervals"]

    def change(group: str, key: str = "masked_mse") -> tuple[str, bool]:
        """An error in words, and whether it has surely risen."""
        was, now = (side[group][key] for side in sides)
        first, last = (bounds[side][group][key] for side in ("before", "after"))  # None of a single picture
        told = f" {bracket(last, '.3g')}" if last else ""
        return f"{now:.3g}{told} (before: {was:.3g})", bool(first and last) and last[0] > first[1]

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
    advice = "Too weak: train longer, or raise --forget_alpha." if not worse else ""
    return " ".join(found), advice or ("Lower --forget_alpha, or retain more pictures." if lost else "")


def _lost(metrics: Mapping[str, Any]) -> list[str]:
    """What of everything else surely comes out right less often: intervals that do not overlap."""
    found = []
    for what, key in KEPT.items():
        before, after = (metrics["intervals"].get(side, {}).get(key) for side in ("before", "after"))
        if before and after and after[1] < before[0]:
            was, now = metrics["before"][key], metrics["after"][key]
            found.append(f"Damage: of {what} {was:.1%} came out right before, {now:.1%} {bracket(after, '.1%')} now.")
    return found[-1:]
