"""The runs that compare gradient projection with EWC, and what is measured of each."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.base.labelled import negative_elbo
from studies.mnist.readings import DIGIT, GREY
from studies.mnist.spread import mean, readings
from studies.mnist.study import Study, draw


@dataclass(frozen=True)
class Method:
    """A way to keep the rest: its title, the name of its runs, and its options of a forgetting run."""

    title: str
    slug: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)


def _projection(title: str, method: str) -> Method:
    return Method(title, method, {"method": method, "ewc_lambda": 0.0})


REFERENCE = Method("Selective Amnesia", "selective_amnesia")
REPLAY = Method("replay only", "replay_only", {"ewc_lambda": 0.0})
PROJECTIONS = (
    _projection("projection, symmetric", "projection-symmetric"),
    _projection("projection, alternating", "projection-alternating"),
    _projection("PCGrad, symmetric", "pcgrad-symmetric"),
    _projection("PCGrad, alternating", "pcgrad-alternating"),
)
METHODS = (REFERENCE, REPLAY, *PROJECTIONS)
LOGGING_STEPS = 5  # odd, so that the records of an alternating method are in turns of its even and its odd steps


def forget_by_all(study: Study, seed: int) -> dict[Method, tuple[Path, dict]]:
    """One run of each method with the random numbers of a seed; samples and the first evaluation are shared."""
    options = {
        "seed": seed,
        "num_train_steps": study.config.projection_steps,
        "latents": "encoder",  # the study's loss: gradients are compared with its own
        "logging_steps": LOGGING_STEPS,
    }
    found = {}
    for method in METHODS:
        name = f"projection/{method.slug}_seed_{seed}"
        found[method] = study.forget(name, DIGIT, **options | method.options)
        folder = found[REFERENCE][0].parent
        options |= {"samples": str(folder / "samples"), "before": str(folder / "evaluation" / "before.safetensors")}
    return found


def measure(study: Study, pipeline: ConditionalVAEPipeline, metrics: dict) -> dict[str, float]:
    """What a run forgot and kept: probabilities and entropy as means over the classifiers, and the ELBO.

    "concept_deviation" needs no classifier: the mean |pixel - grey| of drawn images of the forgotten digit.
    """
    after = readings(study, metrics, "after")
    before = readings(study, metrics, "before")
    drawn = draw(pipeline, DIGIT, study.config.num_images, study.config.seed)
    keys = ("concept_probability", "concept_entropy", "retained_probability", "retained_worst_probability")
    return {key: mean(after, key) for key in keys} | {
        "retained_probability_before": mean(before, "retained_probability"),
        "retained_worst_probability_before": mean(before, "retained_worst_probability"),
        "retained_negative_elbo": retained_elbo(study, pipeline),
        "concept_deviation": (drawn - GREY).abs().mean().item(),
    }


def retained_elbo(study: Study, pipeline: ConditionalVAEPipeline) -> float:
    """Mean negative ELBO in nats of the test images of the digits that were not forgotten."""
    data = study.test_images
    retained = data.without([data.names[DIGIT]])
    return negative_elbo(pipeline, retained, study.config.seed).mean().item()


def describe_gradients(history: list[dict]) -> dict[str, float | None]:
    """The update's norm over a run, and how the two gradients stand to each other where the method looks.

    Args:
        history: a row for every so many steps, at least two.

    Returns:
        "log_norm_first", "log_norm_late": log10 of the norm at the first step, and its median over the second half.
        "jump": the median factor, at least 1, between the norms of one row and the next in the first half, where the
        norm still falls. "cosine", "conflict": the mean cosine of the two gradients, and the share of the rows where
        it is below 0; None for a method without. "learning_rate": the largest.
    """
    logs = [math.log10(row["grad_norm"]) for row in history]
    half = len(logs) // 2
    cosines = [row["gradient_cosine"] for row in history if "gradient_cosine" in row]
    return {
        "log_norm_first": logs[0],
        "log_norm_late": median(logs[half:]),
        "jump": 10 ** median(abs(logs[row + 1] - logs[row]) for row in range(half)),
        "cosine": fmean(cosines) if cosines else None,
        "conflict": fmean(float(cosine < 0) for cosine in cosines) if cosines else None,
        "learning_rate": max(row["learning_rate"] for row in history),
    }
