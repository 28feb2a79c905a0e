"""Rivals of forgetting in the encoder, of models that complete pictures (arXiv 2402.00351, section 4.1)."""

from typing import Any

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.objectives import Frozen, Objective, OutputForgetting, RandomEncoder
from sa_diffusers.methods.base import Context, Weights, register
from sa_diffusers.methods.encoder import FIXED, EncoderMethod


class OutputMethod(EncoderMethod):
    """Training of the whole model on pictures to retain, and away from those to forget; see `OutputForgetting`."""

    def __init__(self, name: str, title: str, summary: str, targets: str):
        super().__init__(name, title, summary, **FIXED, ewc_lambda=0.0, train_scope="full")
        self.targets = targets

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        return {"frozen"}

    def check(self, context: Context) -> None:
        super().check(context)
        if "retain" not in context.pictures:
            raise ValueError(f"{self.name} trains on pictures to retain; pass --retain_images")

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        options, family = context.options, context.family
        strengths = options.forget_alpha, options.retain_weight
        return OutputForgetting(family.loss, frozen, self.targets, *strengths, weights, family.noised)


class RandomEncoderMethod(EncoderMethod):
    """Features of pictures to forget become noise."""

    minimised = RandomEncoder


register(
    OutputMethod("max-loss", "Max Loss", "make pictures to forget unlikely, by the training loss", "own"),
    OutputMethod("noisy-label", "Noisy Label", "fill pictures to forget with noise", "noise"),
    OutputMethod("retain-label", "Retain Label", "fill pictures to forget as if they were others", "retain"),
    OutputMethod("retain-only", "further training", "train on pictures to retain alone: a control", "none"),
    RandomEncoderMethod("random-encoder", "Random Encoder", "features of pictures to forget become noise", **FIXED),
)
