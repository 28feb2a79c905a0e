"""The forgetting runs behind the paper's MNIST results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.loop import TrainingDiverged
from studies.mnist.study import Study


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
        settings: every option that it was run with.
    """

    title: str
    pipeline: Path | None
    metrics: dict | None
    settings: ForgetConfig

    @property
    def authors_lambda(self) -> float:
        """The weight of EWC in the authors' unit."""
        return self.settings.ewc_lambda * AUTHORS_BATCH

    @property
    def replay(self) -> bool:
        """Whether the retained digits were replayed."""
        return self.settings.replay_weight > 0

    @property
    def steps(self) -> int:
        """Of the optimiser."""
        return self.settings.num_train_steps

    @property
    def described(self) -> str:
        """What it was run with, for a sentence."""
        settings = self.settings
        latents = (
            "latents of the encoder" if settings.latents == "encoder" else "latents that pictures were drawn with"
        )
        return (
            f"{self.steps:,} steps (learning rate {settings.learning_rate:g}, {settings.lr_scheduler}; λ "
            f"{self.authors_lambda:g}; {latents})"
        )


def default_run(study: Study, digit: int) -> tuple[Path, dict]:
    """Forget a digit by default; all of these share the samples and the Fisher, which know nothing of the concept."""
    if digit == 0:
        return study.forget("forget_0", 0)
    folder = default_run(study, 0)[0].parent
    return study.forget(f"forget_{digit}", digit, **_samples_of(folder), **_fisher_of(folder))


def fast_run(study: Study) -> Run:
    """Forget 0 by default."""
    return Run("fast default", *default_run(study, 0), study.settings(0))


def faithful_run(study: Study) -> Run:
    """Forget 0 with the authors' settings: their steps, learning rate, batches, lambda, and samples for the Fisher."""
    options = AUTHORS_OPTIONS | {
        "num_train_steps": study.config.faithful_steps,
        "train_batch_size": AUTHORS_BATCH,
        "ewc_lambda": AUTHORS_LAMBDA / AUTHORS_BATCH,
        "num_samples": 50_000,
        "fisher_samples": 50_000,
    }
    return Run("faithful", *study.forget("forget_0_faithful", 0, **options), study.settings(0, **options))


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
    options = options | {"ewc_lambda": authors_lambda / AUTHORS_BATCH}
    try:
        found = study.forget(f"forget_0_{name}", 0, **options)
    except TrainingDiverged:
        found = None, None
    return Run(title, *found, study.settings(0, **options))


def _samples_of(folder: Path) -> dict[str, str]:
    return {"samples": str(folder / "samples")}


def _fisher_of(folder: Path) -> dict[str, str]:
    return {"fisher": str(folder / "fisher.safetensors")}
