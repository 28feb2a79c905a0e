"""Part 6 of the study: gradient projection in place of EWC, and replay with neither, over several seeds.

The study says that projection degrades the retained digits more than Selective Amnesia does, and shows three nearly
identical pictures. Here every method forgets from the same weights with the same random numbers of each seed, so that
differences are taken within a seed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

from sa_diffusers.mnist_study.classifier_spread import spread
from sa_diffusers.mnist_study.image_strips import Strip, strips_figure
from sa_diffusers.mnist_study.paired import Difference, paired_difference
from sa_diffusers.mnist_study.projection_runs import (
    LOGGING_STEPS,
    METHODS,
    PROJECTIONS,
    REFERENCE,
    REPLAY,
    Method,
    describe_gradients,
    forget_by_all,
    measure,
    retained_elbo,
)
from sa_diffusers.mnist_study.readings import DIGIT
from sa_diffusers.mnist_study.study import Study, draw, read, save_figure
from sa_diffusers.pipelines import ConditionalVAEPipeline


# Both by the method's title, a list of one entry for each seed
Numbers = dict[str, list[dict]]  # what is measured of the run
Curves = dict[str, list[list[tuple[int, float]]]]  # steps and the norm of the update there

BATCH = 256  # the study sums its loss over so many images and this package takes the mean: its norms are larger by it
# what tells how much was kept: (its name in tables, whether more of it is better)
KEPT: dict[str, tuple[str, bool]] = {
    "retained_probability": ("retained P", True),
    "retained_worst_probability": ("worst retained P", True),
    "retained_negative_elbo": ("test -ELBO, retained (nats)", False),
}
COLUMNS = {key: label for key, (label, _) in KEPT.items()} | {
    "concept_probability": f"P({DIGIT})",
    "concept_entropy": f"H({DIGIT}) (nats)",
    "concept_deviation": f"|pixel - grey| of drawn {DIGIT}s",
    "log_norm_first": "log10 norm, first step",
    "log_norm_late": "log10 norm, second half",
    "jump": f"factor over {LOGGING_STEPS} steps",
    "cosine": "cosine of the gradients",
    "conflict": "steps in conflict",
}


def run(study: Study) -> dict:
    """The part "projection", computed or read: `num_seeds` runs of each method on first use."""
    return study.part("projection", lambda folder: _compute(study, folder))


def _compute(study: Study, folder: Path) -> dict:
    numbers: Numbers = {method.title: [] for method in METHODS}
    curves: Curves = {method.title: [] for method in METHODS}
    first: dict[str, ConditionalVAEPipeline] = {"original": study.load(study.base())}
    for index in range(study.config.num_seeds):
        for method, (pipeline, metrics) in forget_by_all(study, study.config.seed + index).items():
            history = json.loads((pipeline.parent / "history.json").read_text())
            loaded = study.load(pipeline)
            first.setdefault(method.title, loaded)
            numbers[method.title].append(measure(study, loaded, metrics) | describe_gradients(history))
            curves[method.title].append([(row["step"], row["grad_norm"]) for row in history])
    original = {"retained_negative_elbo": retained_elbo(study, first["original"])}
    return {
        "title": "Gradient projection in place of EWC",
        "text": _text(study, numbers),
        "tables": [_table(numbers, original["retained_negative_elbo"]), _differences(numbers)],
        "figures": [_norms(curves, folder), _pictures(study, first, folder)],
        "numbers": {"by_seed": numbers, "original": original},
    }


def _column(runs: list[dict], key: str) -> list[float]:
    return [run[key] for run in runs if run[key] is not None]


def _differences_from(numbers: Numbers, reference: Method, key: str) -> dict[str, Difference]:
    """Every method's paired difference from a reference, by title."""
    own = _column(numbers[reference.title], key)
    return {
        method.title: paired_difference(_column(numbers[method.title], key), own)
        for method in METHODS
        if method is not reference
    }


def _table(numbers: Numbers, original_elbo: float) -> dict:
    runs = numbers[REFERENCE.title]
    before = [spread(_column(runs, f"{key}_before")) for key in ("retained_probability", "retained_worst_probability")]
    rows = [["original", *before, f"{original_elbo:.3f}", *["–"] * (len(COLUMNS) - 3)]]
    rows += [[title, *(spread(_column(runs, key)) for key in COLUMNS)] for title, runs in numbers.items()]
    title = f"Forgetting {DIGIT}: mean ± standard deviation over {len(runs)} seeds"
    return {"title": title, "columns": ["method", *COLUMNS.values()], "rows": rows}


def _differences(numbers: Numbers) -> dict:
    rows = []
    for reference in (REFERENCE, REPLAY):
        by_key = {key: _differences_from(numbers, reference, key) for key in KEPT}
        for title in next(iter(by_key.values())):
            rows.append([f"{title} - {reference.title}", *(str(by_key[key][title]) for key in KEPT)])
    columns = ["difference", *(label for label, _ in KEPT.values())]
    return {"title": "Paired differences over the seeds: mean ± standard error", "columns": columns, "rows": rows}


def _text(study: Study, numbers: Numbers) -> list[str]:
    runs = numbers[REFERENCE.title]
    text = [
        f"Every method forgets {DIGIT} from the same weights over {len(runs)} seeds, in "
        f"{study.config.projection_steps} steps with a learning rate of at most {runs[0]['learning_rate']:g}; the "
        "study's figure has 2000 steps, with Adam at 1e-4. The loss is the study's, with latents from the encoder. "
        f"Probabilities and entropies are means over {len(study.classifiers)} classifiers. The study says that "
        "projection degrades the retained digits more than Selective Amnesia does."
    ]
    for reference in (REFERENCE, REPLAY):
        for key, (label, more_is_better) in KEPT.items():
            text.append(claim(label, reference.title, more_is_better, _of_projections(numbers, reference, key)))
    words = {1: "less forgotten", -1: "more forgotten", 0: "no clear difference"}
    differences = _of_projections(numbers, REFERENCE, "concept_deviation")
    own = fmean(_column(runs, "concept_deviation"))
    text.append(
        f"What is kept has to be read beside what is forgotten: drawn {DIGIT}s are {own:.4f} away from flat grey "
        f"(mean over the pixels) after {REFERENCE.title}, and the difference from that is "
        f"{_told(differences, words)}."
    )
    return [*text, *_gradient_text(numbers)]


def claim(label: str, reference: str, more_is_better: bool, differences: Mapping[str, Difference]) -> str:
    """Whether projection keeps less than a reference, as sentences.

    Args:
        label: of the measure.
        more_is_better: whether a positive difference is an improvement.
        differences: of each projecting method from the reference, by title.
    """
    worse = -1 if more_is_better else 1
    told = _told(differences, {worse: "worse", -worse: "better", 0: "no clear difference"})
    losing = [title for title, found in differences.items() if found.sign == worse]
    return (
        f"{label[0].upper()}{label[1:]}, difference from {reference}, mean ± standard error over the seeds: {told}. "
        f"By this number less than with {reference} is kept by {', '.join(losing) or 'none of them'}."
    )


def _of_projections(numbers: Numbers, reference: Method, key: str) -> dict[str, Difference]:
    differences = _differences_from(numbers, reference, key)
    return {method.title: differences[method.title] for method in PROJECTIONS}


def _told(differences: Mapping[str, Difference], words: Mapping[int, str]) -> str:
    """Differences with what their sign means: "+0.0010 ± 0.0002 in PCGrad, symmetric (better), ..."."""
    return ", ".join(f"{found} in {title} ({words[found.sign]})" for title, found in differences.items())


def _gradient_text(numbers: Numbers) -> list[str]:
    """How the gradients stand to each other, and their norms beside the study's."""
    by_key = {key: [_column(numbers[method.title], key) for method in PROJECTIONS] for key in ("cosine", "conflict")}
    cosines, conflicts = ([value for column in columns for value in column] for columns in by_key.values())
    starts = [10**value * BATCH for runs in numbers.values() for value in _column(runs, "log_norm_first")]
    late = {title: 10 ** fmean(_column(runs, "log_norm_late")) * BATCH for title, runs in numbers.items()}
    jumps = {title: fmean(_column(runs, "jump")) for title, runs in numbers.items()}
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
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, -(-len(curves) // 2), sharex=True, sharey=True)
    steps = [step for step, _ in curves[REFERENCE.title][0]]
    reference = [fmean(norm for _, norm in rows) for rows in zip(*curves[REFERENCE.title], strict=True)]
    for axis, (title, runs) in zip(panels.flat, curves.items(), strict=True):
        for rows in runs:
            axis.plot(*zip(*rows, strict=True), color="tab:blue", linewidth=0.7, alpha=0.6)
        axis.plot(steps, reference, color="black", linewidth=1, label=f"mean, {REFERENCE.title}")
        axis.set(title=title, yscale="log")
        axis.grid(alpha=0.3)
    panels.flat[0].legend(loc="upper right")
    figure.supxlabel("step")
    figure.supylabel("L2 norm of the update, mean over the batch")
    return {
        "file": save_figure(figure, folder / "projection_norms.png"),
        "caption": "Norm of the update over the steps, a line a seed, on a logarithmic scale. Alternating methods "
        "follow one of the two gradients at a time.",
    }


def _pictures(study: Study, models: Mapping[str, ConditionalVAEPipeline], folder: Path) -> dict:
    """Every digit from every method, from the same latent."""
    judge = next(iter(study.classifiers.values()))
    strips = []
    for title, pipeline in models.items():
        images = [draw(pipeline, digit, 1, study.config.seed) for digit in range(len(pipeline.labels))]
        captions = [f"{read(judge, image)[0, digit]:.2f}" for digit, image in enumerate(images)]
        strips.append(Strip(title, torch.cat(images), captions))
    figure = strips_figure(strips, "Every digit, from one latent: P of the digit asked for, by the first classifier")
    return {
        "file": save_figure(figure, folder / "projection_pictures.png"),
        "caption": "Every digit before and after forgetting by each method (the first seed), from one latent.",
    }
