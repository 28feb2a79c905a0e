"""Prompts that leave the concept open: what the frozen model predicts under them, without the concept's share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import nnls
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch, conditions_of, map_tensors
from sa_diffusers.core.losses import Loss


RIDGE = 0.1  # towards equal shares, as a share of the mean squared distance of the words' predictions


@dataclass(frozen=True)
class MixtureTarget:
    """A term of Selective Amnesia for prompts p that name neither the concept nor a sibling.

    A prediction is the mean over all that the noisy picture may become, so that under p it is a mixture of those under
    "p, word". With its weights w on the simplex, w_0 that of the concept, and e the frozen model's predictions,

        taught:  e(p) + strength s (e_others - e(p, concept)),   e_others = sum_k>0 w_k e(p, word_k) / (1 - w_0),

    s = max(0, w_0 - unearned) / (1 - unearned). Of an exact mixture strength 1 leaves e_others.

    A batch holds samples under p, and in "asked" the conditions [B, W] of "p, word", of the concept first.

    Args:
        loss: of the other terms.
        weight: of the term, > 0.
        strength: >= 0.
        unearned: the part of an equal share 1 / W that is the concept's only since few words are asked; in [0, 1).
    """

    part: ClassVar[str] = "open"
    loss: Loss
    weight: float
    strength: float
    unearned: float = 0.0

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        data = {name: part for name, part in batch.items() if name != "asked"}
        terms = self.loss.sample_terms(len(data["sample"]), generator)
        noise = self.loss.sample_noise(data, generator)
        return {"data": data, "asked": batch["asked"], "terms": terms, "noise": noise}

    def __call__(self, model: nn.Module, frozen: Callable, batch: Batch) -> Batch:
        """The part of a batch of Selective Amnesia that teaches the target."""
        unmarked = {"distilled": torch.zeros_like(batch["terms"], dtype=torch.bool)}
        return unmarked | {
            "data": batch["data"], "frozen": conditions_of(batch["data"]), "terms": batch["terms"],
            "noise": batch["noise"], "target": self.target(frozen, batch),
        }  # fmt: skip

    @torch.no_grad()
    def target(self, frozen: Callable, batch: Batch) -> Tensor:
        """What the model should predict, [B, C, H, W]."""
        data, drawn = batch["data"], (batch["terms"], batch["noise"])
        plain = self.loss.predict(frozen, data, *drawn)
        count = next(iter(batch["asked"].values())).shape[1]
        asked = [map_tensors(batch["asked"], lambda tensor, k=k: tensor[:, k]) for k in range(count)]
        words = [self.loss.predict(frozen, {"sample": data["sample"]} | one, *drawn) for one in asked]
        concept, *others = words
        shares = mixture_weights(plain.flatten(1), torch.stack(words, 1).flatten(2)).to(plain)
        first, rest = shares[:, 0], shares[:, 1:] + torch.finfo(shares.dtype).tiny
        mean = torch.einsum("bk,bk...->b...", rest / rest.sum(1, keepdim=True), torch.stack(others, 1))
        share = (first - self.unearned).clamp_min(0) / (1 - self.unearned)
        return plain + self.strength * share.view(-1, *[1] * (plain.dim() - 1)) * (mean - concept)


def mixture_weights(predicted: Tensor, words: Tensor, ridge: float = RIDGE) -> Tensor:
    """The weights w [B, W] on the simplex of the mixture of words [B, W, D] that comes nearest to predicted [B, D]:

        minimise  |predicted - sum_k w_k words_k|^2 + ridge m |w - 1/W|^2,   m = mean_k |predicted - words_k|^2.

    Where all words say the same they are equal.
    """
    apart = (words - predicted[:, None]).double()
    gram = (apart @ apart.transpose(1, 2)).cpu()
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
    count = gram.shape[1]
    penalised = gram / scale[:, None, None] + ridge * torch.eye(count, dtype=gram.dtype)
    # On the simplex this is w^T P w, whose minimum is that of w^T P w + (sum w - 1)^2 over w >= 0, up to its length.
    rows = torch.cat([torch.linalg.cholesky(penalised).transpose(1, 2), gram.new_ones(len(gram), 1, count)], 1)
    right = gram.new_zeros(count + 1)
    right[-1] = 1
    found = torch.stack([torch.from_numpy(nnls(matrix.numpy(), right.numpy())[0]) for matrix in rows])
    return found / found.sum(1, keepdim=True)
