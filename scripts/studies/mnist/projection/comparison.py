"""Part 6 of the study: gradient projection in place of EWC, and replay with neither, over several seeds.

The study says that projection degrades the retained digits more than Selective Amnesia does, and shows three nearly
identical pictures. Here every method forgets from the same weights with the same random numbers of each seed, so that
differences are taken within a seed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.projection import verdicts
from studies.mnist.projection.runs import (
    LOGGING_STEPS,
    METHODS,
    PROJECTIONS,
    REFERENCE,
    describe_gradients,
    forget_by_all,
    measure,
    retained_elbo,
)
from studies.mnist.readings import DIGIT
from studies.mnist.sections import figure, section, table
from studies.mnist.spread import spread
from studies.mnist.strips import Strip, strips_figure
from studies.mnist.study import Study, draw, read


# Steps and the norm of the update there, by the method's title, a list for each seed
Curves = dict[str, list[list[tuple[int, float]]]]

BATCH = 256  # the study sums its loss over so many images and this package takes the mean: its norms are larger by it
COLUMNS = {key: label for key, (label, _) in verdicts.KEPT.items()} | {
    "concept_probability": f"P({DIGIT})",
    "concept_entropy": f"H({DIGIT}) (nats)",
    verdicts.FORGOTTEN: verdicts.FORGOTTEN_LABEL,
    "log_norm_first": "log10 norm, first step",
    "log_norm_late": "log10 norm, second half",
    "jump": f"factor over {LOGGING_STEPS} steps",
    "cosine": "cosine of the gradients",
    "conflict": "steps in conflict",
}


def compute(study: Study, folder: Path) -> dict:
    """`num_seeds` runs of each method on first use."""
    numbers: verdicts.Numbers = {method.title: [] for method in METHODS}
    curves: Curves = {method.title: [] for method in METHODS}
    first: dict[str, ConditionalVAEPipeline] = {"original": study.load(study.base())}
    for index in range(study.config.num_seeds):
        for method, (pipeline, metrics) in forget_by_all(study, study.config.seed + index).items():
            history = json.loads((pipeline.parent / "history.json").read_text())
            loaded = study.load(pipeline)
            first.setdefault(method.title, loaded)
            numbers[method.title].append(measure(study, loaded, metrics) | describe_gradients(history))
            curves[method.title].append([(row["step"], row["grad_norm"]) for row in history])
    comparisons, elbo = verdicts.compare_all(numbers), retained_elbo(study, first["original"])
    return {"title": "Gradient projection in place of EWC"} | section(
        _text(study, numbers, comparisons),
        [_table(numbers, elbo), verdicts.differences_table(numbers), verdicts.verdicts_table(comparisons)],
        [_norms(curves, folder), _pictures(study, first, folder)],
        {
            "by_seed": numbers,
            "original": {"retained_negative_elbo": elbo},
            "comparisons": [each.numbers() for each in comparisons],
        },
    )


def _table(numbers: verdicts.Numbers, original_elbo: float) -> dict:
    runs = numbers[REFERENCE.title]
    before = [
        spread(verdicts.column(runs, f"{key}_before"))
        for key in ("retained_probability", "retained_worst_probability")
    ]
    rows = [["original", *before, f"{original_elbo:.3f}", *["–"] * (len(COLUMNS) - 3)]]
    rows += [[title, *(spread(verdicts.column(runs, key)) for key in COLUMNS)] for title, runs in numbers.items()]
    title = f"Forgetting {DIGIT}: mean ± standard deviation over {len(runs)} seeds"
    return table(title, ["method", *COLUMNS.values()], rows)


def _text(study: Study, numbers: verdicts.Numbers, comparisons: Sequence[verdicts.Comparison]) -> list[str]:
    runs = numbers[REFERENCE.title]
    return [
        f"Every method forgets {DIGIT} from the same weights over {len(runs)} seeds, in "
        f"{study.config.projection_steps} steps with a learning rate of at most {runs[0]['learning_rate']:g}; the "
        "study's figure has 2000 steps, with Adam at 1e-4. The loss is the study's, with latents from the encoder. "
        f"Probabilities and entropies are means over {len(study.classifiers)} classifiers. The study says that "
        "projection degrades the retained digits more than Selective Amnesia does.",
        *verdicts.verdicts_text(numbers, comparisons),
        *_gradient_text(numbers),
    ]


def _gradient_text(numbers: verdicts.Numbers) -> list[str]:
    """How the gradients stand to each other, and their norms beside the study's."""
    cosines, conflicts = (
        [value for method in PROJECTIONS for value in verdicts.column(numbers[method.title], key)]
        for key in ("cosine", "conflict")
    )
    starts = [10**value * BATCH for runs in numbers.values() for value in verdicts.column(runs, "log_norm_first")]
    late = {title: 10 ** fmean(verdicts.column(runs, "log_norm_late")) * BATCH for title, runs in numbers.items()}
    jumps = {title: fmean(verdicts.column(runs, "jump")) for title, runs in numbers.items()}
    return [
        f"In the runs that project, the gradients of surrogate and replay have a mean cosine from {min(cosines):.2f} "
        f"to {max(cosines):.2f}, and it is below 0 in {min(conflicts):.0%} to {max(conflicts):.0%} of the steps.",
        f"Norm of the update in the study's unit ({BATCH} times ours): {min(starts):.1e} to {max(starts):.1e} at the "
        "first step (the study: 2.3e6); median of the second half "
        + ", ".join(f"{value:.1e} ({title})" for title, value in late.items())
        + " (the study: about 1e4 from step 500 on).",
        f"Median factor by which the norm changes over {LOGGING_STEPS} steps in the first half: "
        + ", ".join(f"{value:.2f} ({title})" for title, value in jumps.items())
        + "; the study sees the alternating method oscillate between 1e4 and 4e5 early on.",
    ]


def _norms(curves: Curves, folder: Path) -> dict:
    """A panel for each method: its seeds, above the mean of the reference."""
    drawn = Figure(figsize=(12, 7), layout="constrained")
    panels = drawn.subplots(2, -(-len(curves) // 2), sharex=True, sharey=True)
    steps = [step for step, _ in curves[REFERENCE.title][0]]
    reference = [fmean(norm for _, norm in rows) for rows in zip(*curves[REFERENCE.title], strict=True)]
    for axis, (title, runs) in zip(panels.flat, curves.items(), strict=True):
        for rows in runs:
            axis.plot(*zip(*rows, strict=True), color="tab:blue", linewidth=0.7, alpha=0.6)
        axis.plot(steps, reference, color="black", linewidth=1, label=f"mean, {REFERENCE.title}")
        axis.set(title=title, yscale="log")
        axis.grid(alpha=0.3)
    panels.flat[0].legend(loc="upper right")
    drawn.supxlabel("step")
    drawn.supylabel("L2 norm of the update, mean over the batch")
    caption = (
        "Norm of the update over the steps, a line a seed, on a logarithmic scale. Alternating methods follow one of "
        "the two gradients at a time."
    )
    return figure(drawn, folder / "projection_norms.png", caption)


def _pictures(study: Study, models: Mapping[str, ConditionalVAEPipeline], folder: Path) -> dict:
    """Every digit from every method, from the same latent."""
    judge = next(iter(study.classifiers.values()))
    strips = []
    for title, pipeline in models.items():
        images = [draw(pipeline, digit, 1, study.config.seed) for digit in range(len(pipeline.labels))]
        captions = [f"{read(judge, image)[0, digit]:.2f}" for digit, image in enumerate(images)]
        strips.append(Strip(title, torch.cat(images), captions))
    drawn = strips_figure(strips, "Every digit, from one latent: P of the digit asked for, by the first classifier")
    caption = "Every digit before and after forgetting by each method (the first seed), from one latent."
    return figure(drawn, folder / "projection_pictures.png", caption)
