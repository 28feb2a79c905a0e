"""The loss of a model that tells hidden tokens from visible ones."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.losses.protocol import PatchLoss


class TokenLoss(PatchLoss):
    """Mean cross-entropy of hidden tokens (Chang et al. 2022, Eq. 1), in nats; a single term.

    The model is called as `model(tokens, hidden)` and returns an object with `.logits` [B, L, K] and `.features`. A
    batch holds "sample", pictures [B, C, H, W] in [-1, 1], and "hidden" [B, L] of booleans. What is visible is encoded
    without the hidden pixels, so that nothing of these leaks; targets are the tokens of the whole picture. While it is
    trained a part of the hole is shown, as while it is filled: noise [B, 1 + L] in [0, 1) is u and a draw for each
    token, which stays hidden where that is below cos(pi u / 2).

    Args:
        tokenise: pictures [B, C, H, W] to tokens [B, L], without a gradient.
    """

    num_terms = 1
    reduction: Literal["sum", "mean"] = "mean"
    prediction_type = "tokens"

    def __init__(self, tokenise: Callable[[Tensor], Tensor]):
        self.patches = tokenise

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        rows, places = batch["hidden"].shape
        return torch.rand(rows, 1 + places, generator=generator).to(batch["sample"].device)

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """One value per sample [B].

        Args:
            noise: one of a single dimension shows nothing of the hole.
            target: tokens [B, L], or logits of them [B, L, K]; None: those of the pictures.
        """
        truth, hidden = self.patches(batch["sample"]), batch["hidden"]
        if noise.dim() > 1:
            hidden = hidden & (noise[:, 1:] < (math.pi / 2 * noise[:, :1]).cos())
        target = truth if target is None else target.softmax(2).mT if target.is_floating_point() else target
        errors = F.cross_entropy(self.forward(model, batch, truth, hidden).logits.mT, target, reduction="none")
        return (errors * hidden).sum(1) / hidden.sum(1).clamp(min=1)

    def forward(self, model: Callable, batch: Batch, shown: Tensor | None = None, hidden: Tensor | None = None) -> Any:
        """The model's output of what is visible, and of the tokens `shown` [B, L] in holes that are not `hidden`."""
        hole = batch["hidden"]
        tokens = self.patches(batch["sample"] * ~spread(hole, batch["sample"].shape[2]))
        return model(tokens if shown is None else torch.where(hole, shown, tokens), hole if hidden is None else hidden)


def spread(hidden: Tensor, size: int) -> Tensor:
    """Patches [B, L] of a square, row by row, as pixels [B, 1, size, size]."""
    rows = math.isqrt(hidden.shape[1])
    return hidden.view(-1, 1, rows, rows).repeat_interleave(size // rows, 2).repeat_interleave(size // rows, 3)
