"""What a Fisher of an encoder's embeddings is the Fisher of."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch, cat, take, to
from sa_diffusers.core.losses.protocol import Loss


class EmbeddingLoss(Loss):
    """<E(x), e> / sqrt(D), e ~ N(0, I), averaged over depths so that its Fisher is the mean over these of J'J / D.

    The distance of embeddings to a frozen copy's has no gradient where training starts, so there is no Fisher of it.
    This one is that of the Gaussian N(E(x), I): of embeddings that are sampled. By it a small change d of the weights
    costs d'Fd, which is the mean squared change of the embeddings, the loss of retaining in `EncoderForgetting`.

    Args:
        features, noised: as of `EncoderForgetting`.
        told: what else decides them, for the metadata of a Fisher.
    """

    num_terms = 1
    reduction: Literal["sum", "mean"] = "mean"
    prediction_type = "embeddings"

    def __init__(self, features: Callable, noised: Callable, told: Mapping[str, str]):
        self.features, self.noised, self.told = features, noised, told

    @property
    def grid(self) -> dict[str, float | str]:
        return dict(self.told)

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        """A seed a row, [B]: of e, and of what the features are seen in."""
        return torch.randint(2**62, (len(batch["sample"]),), generator=generator)

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """One value per sample [B]; there is no target."""
        generators = [Generator().manual_seed(seed) for seed in noise.tolist()]
        seen = cat([self.noised(take(batch, [row]), one) for row, one in enumerate(generators)])
        found = self.features(model, to(seen, batch["sample"].device))
        total = torch.zeros(len(noise)).to(found[0])
        for part in found:
            drawn = torch.stack([torch.randn(part.shape[1:], generator=one) for one in generators]).to(part)
            total = total + (part * drawn).flatten(1).sum(1) / math.sqrt(len(found) * part[0].numel())
        return total
