"""The line that a run's page and its terminal open with says what the intervals say, and no more."""

import pytest

from sa_diffusers.report.verdict import verdict


def metrics(concept, interval, unseen=None, surrogate="three", noise=None, worst=(0.98, 0.97, (0.92, 0.99))):
    was, now, bounds = worst
    after = {"concept_probability": concept, "retained_worst_accuracy": now, "noise_probability": noise}
    intervals = {"concept_probability": interval, "retained_worst_accuracy": bounds}
    if unseen is not None:
        after["concept_probability_unseen"], intervals["concept_probability_unseen"] = unseen
    before = {"concept_probability": 0.99, "retained_worst_accuracy": was}
    return {"surrogate": surrogate, "before": before, "after": after, "intervals": {"after": intervals}}


@pytest.mark.parametrize(
    ("found", "says", "advises"),
    [
        (metrics(0.73, (0.39, 0.92)), "Not forgotten: asked for, it shows with 73.0% [39.0%, 92.0%].", "Too weak"),
        (metrics(0.08, (0.03, 0.19)), "Not clearly forgotten:", "Too weak"),
        (metrics(0.01, (0.0, 0.03)), "Forgotten: asked for, it shows with 1.0%", ""),
        (metrics(0.01, (0.0, 0.03), (0.4, (0.3, 0.5))), "Not forgotten: asked for in unseen words", "Too weak"),
        (metrics(0.12, (0.09, 0.16), surrogate="noise", noise=0.1), "Forgotten: asked for", ""),
        (metrics(0.12, (0.11, 0.16), noise=0.1), "Not forgotten: asked for", "Too weak"),
        (
            metrics(0.01, (0.0, 0.03), worst=(0.98, 0.5, (0.4, 0.6))),
            "98.0% right before, 50.0% [40.0%, 60.0%] now",
            "Too s",
        ),
        (metrics(None, None), "Not judged: no classifier", "Look at them"),
    ],
)
def test_it_says_what_the_intervals_say(found, says, advises):
    line, advice = verdict(found)
    assert says in line
    assert advice.startswith(advises) and bool(advice) == bool(advises)
