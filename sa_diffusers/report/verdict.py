"""What the numbers of a run come to, in one line: by their intervals, and never more than these say."""

from collections.abc import Mapping, Sequence
from typing import Any

from sa_diffusers.report.tables import bracket


SHOWN = 0.1  # a concept whose probability surely is at most this counts as forgotten
ASKED = {"asked for": "concept_probability", "asked for in unseen words": "concept_probability_unseen"}


def verdict(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict, and what to try next ("" where nothing is to be tried).

    A concept is forgotten where the upper end of its interval is at most `SHOWN`, or so much above what the classifier
    says of pure noise where it was led there; not forgotten where the lower end is above that.

    Args:
        metrics: metrics.json of a run.
    """
    before, after = metrics["before"], metrics["after"]
    intervals = metrics.get("intervals", {}).get("after", {})
    asked = [(after[key], intervals[key], what) for what, key in ASKED.items() if intervals.get(key)]
    if not asked:
        return "Not judged: no classifier has read the pictures.", "Look at them, or pass one that knows the concept."
    value, interval, what = max(asked, key=lambda found: found[0])
    limit = SHOWN + (after.get("noise_probability") or 0.0 if metrics.get("surrogate") == "noise" else 0.0)
    low, high = interval
    outcome = "Forgotten" if high <= limit else "Not forgotten" if low > limit else "Not clearly forgotten"
    said = f"{outcome}: {what}, it shows with {value:.1%} {bracket(interval, '.1%')}."
    damage, kept = _damage(before, after, intervals.get("retained_worst_accuracy"))
    if high > limit:
        advice = "Too weak: try more --num_train_steps, a nearer --surrogate, a smaller --ewc_lambda or --start edit."
    elif damage:
        advice = "Too strong: try fewer --num_train_steps, a larger --ewc_lambda or --replay_weight."
    else:
        advice = ""
    return f"{said} {kept}".strip(), advice


def _damage(before: Mapping[str, Any], after: Mapping[str, Any], interval: Sequence[float] | None) -> tuple[bool, str]:
    """Whether the worst of the other classes surely lost, and the line that says what it was and is."""
    was, now = before.get("retained_worst_accuracy"), after.get("retained_worst_accuracy")
    if was is None or now is None or interval is None:
        return False, ""
    line = f"The worst of the others: {was:.1%} right before, {now:.1%} {bracket(interval, '.1%')} now."
    return interval[1] < was, line
