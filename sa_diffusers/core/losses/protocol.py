"""The negative ELBO of a generative model, one value per sample, as a pure function: noise and terms are arguments.

The ELBO is a sum of `num_terms` terms (T timesteps for diffusion). Training draws one term per sample, so that its
mean estimates a T-th of the sum; the Fisher needs the gradient of the sum over all of them (fisher.py).
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch


# Of a mean over latents, whose gradient float16 would lose. As a power of two it changes nothing in other precisions.
GRADIENT_SCALE = 2.0**14


class Loss(Protocol):
    """All that the Fisher and every objective ask of a model's training loss; the last four, of one that denoises."""

    num_terms: int
    reduction: Literal["sum", "mean"]  # over data dimensions only, never over the batch
    prediction_type: str  # what the model predicts; with the reduction it decides the unit

    @property
    def grid(self) -> dict[str, float | str]:
        """What else decides the terms and their unit, by name: nothing, where they are timesteps of equal weight."""
        return {}

    def sample_terms(self, count: int, generator: Generator) -> Tensor:
        """The terms of a training batch, [count], uniform where the loss says nothing else."""
        return torch.randint(self.num_terms, (count,), generator=generator)

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        """Draw the noise that a call needs, on the device of the batch."""
        ...

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """One value per sample [B] from terms [B] (integers in [0, num_terms)) and noise [B, ...].

        Args:
            target: what should be predicted, [B, ...]; None: `target`.
        """
        ...

    def predict(self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        """What a model makes of the noisy samples, [B, ...]."""
        raise NotImplementedError(f"{type(self).__name__} predicts nothing of noisy samples")

    def target(self, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        """What it should make of them, by what was drawn, [B, ...]."""
        raise NotImplementedError(f"{type(self).__name__} has no target")

    def times(self, terms: Tensor) -> Tensor:
        """What the model is told of the noise level of each term, [B]."""
        raise NotImplementedError(f"{type(self).__name__} has no noise levels")

    def call(self, model: Callable, noisy: Tensor, times: Tensor, conditions: Batch) -> Tensor:
        """What a model predicts of noisy samples [B, ...] at these times [B], under what a batch holds besides."""
        raise NotImplementedError(f"{type(self).__name__} predicts nothing of noisy samples")


class PatchLoss(Loss, Protocol):
    """A loss by the patches, or tokens, of what was hidden."""

    patches: Callable[[Tensor], Tensor]  # of pictures [B, C, H, W], the target of a loss

    def forward(self, model: Callable, batch: Batch) -> Any:
        """The model's output of what a batch leaves visible, with `.logits`."""
        ...

    def outputs(self, model: Callable, batch: Batch) -> Tensor:
        """What the model fills holes with, in the form of a target, [B, ...]."""
        return self.forward(model, batch).logits

    def towards(self, batch: Batch, others: Tensor) -> tuple[Batch, Tensor]:
        """A batch, and its target, by which holes are filled as those of other pictures [B, C, H, W] should be."""
        return batch, self.patches(others)
