"""The forgetting runs behind the paper's MNIST results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_diffusers.loading import family_defaults
from sa_diffusers.mnist_study.study import Study
from sa_diffusers.training import TrainingDiverged


AUTHORS_BATCH = 256  # they sum the loss over it, and this package takes the mean: their lambda is 256 times ours
AUTHORS_LAMBDA = 100
LAMBDAS = (0, 1, 10, 100, 1000)
AUTHORS_OPTIONS = {"learning_rate": 1e-4, "lr_scheduler": "constant", "latents": "encoder"}


@dataclass(frozen=True)
class Run:
    """A forgetting run.

    Attributes:
        title: what tables and figures call it.
        pipeline, metrics: its folder and its metrics.json; None where the training diverged.
        authors_lambda: the weight of EWC in the authors' unit.
        replay: whether the retained digits were replayed.
        steps: of the optimiser.
    """

    title: str
    pipeline: Path | None
    metrics: dict | None
    authors_lambda: float
    replay: bool
    steps: int


def default_run(study: Study, digit: int) -> tuple[Path, dict]:
    """Forget a digit by default; all of these share the samples and the Fisher, which know nothing of the concept."""
    if digit == 0:
        return study.forget("forget_0", 0)
    folder = default_run(study, 0)[0].parent
    return study.forget(f"forget_{digit}", digit, **_samples_of(folder), **_fisher_of(folder))


def fast_run(study: Study) -> Run:
    """Forget 0 by default."""
    options = family_defaults("ConditionalVAEPipeline")
    return Run(
        "fast default", *default_run(study, 0), options["ewc_lambda"] * AUTHORS_BATCH, True, _default_steps(study)
    )


def faithful_run(study: Study) -> Run:
    """Forget 0 with the authors' settings: their steps, learning rate, batches, lambda, and samples for the Fisher."""
    steps = study.config.faithful_steps
    found = study.forget(
        "forget_0_faithful",
        0,
        num_train_steps=steps,
        train_batch_size=AUTHORS_BATCH,
        ewc_lambda=AUTHORS_LAMBDA / AUTHORS_BATCH,
        num_samples=50_000,
        fisher_samples=50_000,
        **AUTHORS_OPTIONS,
    )
    return Run("faithful", *found, AUTHORS_LAMBDA, True, steps)


def ablation_runs(study: Study) -> list[Run]:
    """Forget 0 by default but for lambda, replay, the latents, or the objective, which comes last."""
    folder = default_run(study, 0)[0].parent
    samples, fisher = _samples_of(folder), _fisher_of(folder)
    no_replay, encoder = {"replay_weight": 0.0}, {"latents": "encoder"}
    runs = []
    for value in LAMBDAS:
        title = f"λ {value}" + ("" if value else " (no EWC)")
        runs.append(_ablation(study, f"lambda_{value}", title, value, samples | (fisher if value else {})))
    return runs + [
        _ablation(study, "no_replay", "no replay", AUTHORS_LAMBDA, no_replay | fisher),
        _ablation(study, "neither", "neither", 0, no_replay),
        _ablation(study, "encoder", "latents of the encoder", AUTHORS_LAMBDA, encoder | samples | fisher),
        # At the default learning rate its unbounded term overflows within a few hundred steps.
        _ablation(study, "naive", "naive", AUTHORS_LAMBDA, {"method": "naive"} | AUTHORS_OPTIONS | samples | fisher),
    ]


def _ablation(study: Study, name: str, title: str, authors_lambda: float, options: dict[str, Any]) -> Run:
    try:
        found = study.forget(f"forget_0_{name}", 0, ewc_lambda=authors_lambda / AUTHORS_BATCH, **options)
    except TrainingDiverged:
        found = None, None
    return Run(title, *found, authors_lambda, "replay_weight" not in options, _default_steps(study))


def _default_steps(study: Study) -> int:
    return study.config.forget_steps or family_defaults("ConditionalVAEPipeline")["num_train_steps"]


def _samples_of(folder: Path) -> dict[str, str]:
    return {"samples": str(folder / "samples")}


def _fisher_of(folder: Path) -> dict[str, str]:
    return {"fisher": str(folder / "fisher.safetensors")}
