"""The line that a run's page and its terminal open with says what the intervals say, and no more."""

import pytest

from sa_diffusers.report.verdict import verdict


def metrics(concept, interval, unseen=None, surrogate="three", noise=None, worst=(0.97, (0.92, 0.99))):
    now, bounds = worst
    after = {"concept_probability": concept, "retained_worst_accuracy": now, "noise_probability": noise}
    intervals = {"concept_probability": interval, "retained_worst_accuracy": bounds}
    if unseen is not None:
        after["concept_probability_unseen"], intervals["concept_probability_unseen"] = unseen
    before, earlier = {"retained_worst_accuracy": 0.98}, {"retained_worst_accuracy": (0.93, 0.99)}
    return {
        "surrogate": surrogate,
        "before": before,
        "after": after,
        "intervals": {"before": earlier, "after": intervals},
    }


@pytest.mark.parametrize(
    ("found", "says", "advises"),
    [
        (metrics(0.73, (0.39, 0.92)), "Not forgotten: asked for, it shows with 73.0% [39.0%, 92.0%].", "Too weak"),
        (metrics(0.15, (0.03, 0.19)), "Not clearly forgotten:", "Too weak"),
        (metrics(0.0, (0.0, 0.28)), "Not clearly forgotten:", "Undecided"),
        (metrics(0.01, (0.0, 0.03)), "Forgotten: asked for, it shows with 1.0%", ""),
        (metrics(0.01, (0.0, 0.03), (0.4, (0.3, 0.5))), "Not forgotten: asked for in unseen words", "Too weak"),
        (
            metrics(0.08, (0.06, 0.095), (0.05, (0.01, 0.25))),
            "Not clearly forgotten: asked for in unseen",
            "Undecided",
        ),
        (metrics(0.25, (0.2, 0.3), (0.3, (0.05, 0.7))), "Not forgotten: asked for, it shows with 25.0%", "Too weak"),
        (metrics(0.12, (0.09, 0.16), surrogate="noise", noise=0.1), "Forgotten: asked for", ""),
        (
            metrics(0.93, (0.9, 0.96), surrogate="noise", noise=0.9),
            "Not judged: the classifier takes pure noise",
            "Look",
        ),
        (metrics(0.12, (0.11, 0.16), noise=0.1), "Not forgotten: asked for", "Too weak"),
        (
            metrics(0.01, (0.0, 0.03), worst=(0.5, (0.4, 0.6))),
            "98.0% came out right before, 50.0% [40.0%",
            "Too strong",
        ),
        (metrics(None, None), "Not judged: no classifier", "Look at them"),
    ],
)
def test_it_says_what_the_intervals_say(found, says, advises):
    line, advice = verdict(found)
    assert says in line
    assert advice.startswith(advises) and bool(advice) == bool(advises)
