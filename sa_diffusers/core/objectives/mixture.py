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
    """A term of Selective Amnesia for prompts p that name neither a concept nor a sibling.

    A prediction is the mean over all that the noisy picture may become, so that under p it is a mixture of those under
    "p, word". With its weights w on the simplex, W_0 the sum of the concepts', and e the frozen model's predictions,

        taught:  e(p) + strength s (e_others - e_concepts),   e_others = sum w_k e(p, word_k) / (1 - W_0) over others,

    e_concepts likewise, s = max(0, W_0 - unearned) / (1 - unearned). Of an exact mixture, with unearned 0,
    strength 1 leaves e_others.

    A batch holds samples under p, and in "asked" the conditions [B, W] of "p, word", of the concepts first.

    Args:
        loss: of the other terms.
        weight: of the term, > 0.
        strength: >= 0.
        unearned: the part of equal shares that is the concepts' only since few words are asked; in [0, 1).
        concepts: how many there are.
    """

    part: ClassVar[str] = "open"
    loss: Loss
    weight: float
    strength: float
    unearned: float = 0.0
    concepts: int = 1

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
        words = torch.stack([self.loss.predict(frozen, {"sample": data["sample"]} | one, *drawn) for one in asked], 1)
        shares = mixture_weights(plain.flatten(1), words.flatten(2)).to(plain)
        concepts, others = _split_mean(shares, words, self.concepts)
        share = (shares[:, : self.concepts].sum(1) - self.unearned).clamp_min(0) / (1 - self.unearned)
        return plain + self.strength * share.view(-1, *[1] * (plain.dim() - 1)) * (others - concepts)


def _split_mean(shares: Tensor, words: Tensor, count: int) -> list[Tensor]:
    """The means [B, ...] of the first `count` words and of the others, by their shares."""
    parts = ((shares[:, some], words[:, some]) for some in (slice(count), slice(count, None)))
    tiny = torch.finfo(shares.dtype).tiny
    return [torch.einsum("bk,bk...->b...", (w + tiny) / (w + tiny).sum(1, keepdim=True), part) for w, part in parts]


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
