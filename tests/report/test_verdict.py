"""The line that a run's page and its terminal open with says what the intervals say, and no more."""

import pytest

from sa_diffusers.report.verdict import verdict


REMEDIES = ("more steps", "fewer steps")
WEAK, STRONG = (f"Too {name}: try {what}." for name, what in zip(("weak", "strong"), REMEDIES, strict=True))


def metrics(concept, interval, unseen=None, surrogate="three", noise=None, worst=(0.97, (0.92, 0.99))):
    by_class = "retained_accuracy_by_class"
    after = {"concept_probability": concept, by_class: {"four": worst[0]}, "noise_probability": noise}
    intervals = {"concept_probability": interval, by_class: {"four": worst[1]}}
    if unseen is not None:
        after["concept_probability_unseen"], intervals["concept_probability_unseen"] = unseen
    return {
        "surrogate": surrogate,
        "attribute": "digit",
        "before": {by_class: {"four": 0.98}},
        "after": after,
        "intervals": {"before": {by_class: {"four": (0.93, 0.99)}}, "after": intervals},
    }


@pytest.mark.parametrize(
    ("found", "says", "advises"),
    [
        (
            metrics(0.73, (0.39, 0.92)),
            "Not forgotten: asked for, it shows with 73.0% [39.0%, 92.0%].",
            WEAK,
        ),
        (metrics(0.15, (0.03, 0.19)), "Not clearly forgotten:", WEAK),
        (metrics(0.0, (0.0, 0.28)), "Not clearly forgotten:", "Undecided"),
        (metrics(0.01, (0.0, 0.03)), "Forgotten: asked for, it shows with 1.0%", ""),
        (
            metrics(0.01, (0.0, 0.03), (0.4, (0.3, 0.5))),
            "Not forgotten: asked for in unseen words",
            WEAK,
        ),
        (
            metrics(0.08, (0.06, 0.095), (0.05, (0.01, 0.25))),
            "Not clearly forgotten: asked for in unseen",
            "Undecided",
        ),
        (
            metrics(0.25, (0.2, 0.3), (0.3, (0.05, 0.7))),
            "Not forgotten: asked for, it shows with 25.0%",
            WEAK,
        ),
        (metrics(0.12, (0.09, 0.16), surrogate="noise", noise=0.1), "Forgotten: asked for", ""),
        (
            metrics(0.93, (0.9, 0.96), surrogate="noise", noise=0.9),
            "Not judged: the classifier takes pure noise",
            "Look",
        ),
        (metrics(0.12, (0.11, 0.16), noise=0.1), "Not forgotten: asked for", WEAK),
        (
            metrics(0.01, (0.0, 0.03), worst=(0.5, (0.4, 0.6))),
            "Worst damage: four, 98.0% [93.0%, 99.0%] before, 50.0% [40.0%, 60.0%] after.",
            STRONG,
        ),
        (metrics(None, None), "Not judged: no classifier", "Look at them"),
        (
            metrics(None, None)
            | {"judged_by": {"name": "the model", "instead": "“three”"}}
            | {"before": {}, "after": {"concept_preference": 0.02}}
            | {"intervals": {"before": {}, "after": {"concept_preference": (0.004, 0.109)}}},
            "Not clearly forgotten: the model prefers it to “three” in 2.0%",
            "Undecided: look at the pictures, or pass a --classifier.",
        ),
    ],
)
def test_it_says_what_the_intervals_say(found, says, advises):
    line, advice = verdict(found, REMEDIES)
    assert says in line
    assert advice.startswith(advises) and bool(advice) == bool(advises)
