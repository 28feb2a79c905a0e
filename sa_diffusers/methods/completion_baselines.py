"""Rivals of forgetting in the encoder, of models that complete pictures (arXiv 2402.00351, section 4.1)."""

from collections.abc import Callable
from typing import Any

from sa_diffusers.core.batches import Batch, take
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.objectives import Frozen, Objective, OutputForgetting, RandomEncoder
from sa_diffusers.methods.base import Context, Weights, register
from sa_diffusers.methods.encoder import FIXED, EncoderMethod, PictureBatches


class Rival(EncoderMethod):
    """What two of them share that the released code for tokens weighs wrongly, if that is asked for."""

    def check(self, context: Context) -> None:
        super().check(context)
        if context.options.authors_baselines and "retain" not in context.pictures:
            raise ValueError("authors_baselines changes pictures to retain; pass --retain_images")

    def batches(self, context: Context) -> Callable[[int], Batch]:
        usual = super().batches(context)
        return AuthorsBatches(usual) if context.options.authors_baselines else usual


class AuthorsBatches:
    """The released code weighs both terms by 1 + y, which is 0 for pictures to forget and 2 for those to retain.

    So the latter are in both; the targets of Retain Label are outputs of others among them.
    """

    def __init__(self, usual: PictureBatches):
        self.usual = usual

    def __call__(self, step: int) -> Batch:
        parts = self.usual(step)
        rows = range(len(parts["retain"]["sample"]))
        return parts | {"forget": take(parts["retain"], [*rows[1:], *rows[:1]])}


class OutputMethod(Rival):
    """Training of the whole model on pictures to retain, and away from those to forget; see `OutputForgetting`."""

    ignores = ("timestep_range", "feature_depths", "surrogate_context", "fisher_of", "retain_bound")

    def __init__(self, name: str, title: str, summary: str, targets: str):
        super().__init__(name, title, summary, **FIXED, ewc_lambda=0.0, train_scope="full")
        self.targets = targets
        self.ignores = OutputMethod.ignores + (() if targets == "retain" else EncoderMethod.ignores)
        self.ignores += () if targets == "noise" else ("noise_rank",)

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        return {"frozen"} if self.targets == "retain" else set()

    def check(self, context: Context) -> None:
        super().check(context)
        if "retain" not in context.pictures:
            raise ValueError(f"{self.name} trains on pictures to retain; pass --retain_images")

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        options, family = context.options, context.family
        strengths = options.forget_alpha, options.retain_weight
        return OutputForgetting(family.loss, frozen, self.targets, *strengths, weights, family.noised)


class RandomEncoderMethod(Rival):
    """Features of pictures to forget become noise."""

    ignores = ("surrogate_context", "noise_rank", "retain_bound")
    minimised = RandomEncoder


register(
    OutputMethod("max-loss", "Max Loss", "make pictures to forget unlikely, by the training loss", "own"),
    OutputMethod("noisy-label", "Noisy Label", "fill pictures to forget with noise", "noise"),
    OutputMethod("retain-label", "Retain Label", "fill pictures to forget as if they were others", "retain"),
    OutputMethod("retain-only", "further training", "train on pictures to retain alone: a control", "none"),
    RandomEncoderMethod("random-encoder", "Random Encoder", "features of pictures to forget become noise", **FIXED),
)
