"""Robust training: the surrogate under embeddings that bring the concept back, found against the weights of now."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch, cat, map_tensors, take
from sa_diffusers.core.losses import GRADIENT_SCALE, Loss


@dataclass(frozen=True)
class Adversary:
    """A third term of Selective Amnesia, loss(surrogate | what an adversary found) on the concept's own pictures x.

    Of each group of rows, with noise and terms drawn once, K vectors v in a template are sought by `steps` of Adam,

        minimise over v  |eps(x_t, t, template(v)) - eps*(x_t, t, concept)|^2,   eps* of the frozen model,

    and eps(x_t, t, template(v)) is then taught eps*(x_t, t, surrogate) in one pass with the other terms. Groups share
    nothing, so that it makes no difference where each is computed. One step is by the sign of the gradient. What is
    sought may also be the perturbation of whole embeddings: with one step that of AEGIS (arXiv 2602.06771), which
    carries its own on from update to update, where this begins at the concept's captions, a function of seed and step.

    A batch has G groups of R rows: "sample" [G, R, C, H, W]; "asked" and "frozen", the conditions of the concept and
    of the surrogate; "rows", the templates [G, R]; "start", the vectors [G, K, D] or perturbations [G, N].

    Args:
        loss: of the other terms.
        encode: the conditions of templates [R] filled with vectors [K, D], or of captions [R] moved by [N]; gradients
            pass to these.
        weight: of the term, > 0.
        steps: of the search, >= 1.
        rate: of its Adam, in the unit of the vectors.
    """

    part: ClassVar[str] = "adversary"
    loss: Loss
    encode: Callable[[Tensor, list[int]], Batch]
    weight: float
    steps: int
    rate: float

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        """With noise, and terms from R equal parts of all, one each; of a flow with a density of its own, by that."""
        groups, rows = batch["rows"].shape
        if getattr(self.loss, "density", "uniform") == "uniform":
            width = self.loss.num_terms / rows
            places = (torch.arange(rows) + torch.rand(groups, rows, generator=generator)) * width
            terms = places.long().clamp_max(self.loss.num_terms - 1)
        else:
            terms = self.loss.sample_terms(groups * rows, generator).view(groups, rows)
        return {**batch, "terms": terms, "noise": self.loss.sample_noise(batch, generator)}

    def __call__(self, model: nn.Module, frozen: Callable, batch: Batch) -> Batch:
        """The part of a batch of Selective Amnesia that teaches what was found."""
        module = getattr(model, "module", model)  # no gradient of the weights is taken: nothing to share
        groups = [take(batch, index) for index in range(len(batch["rows"]))]
        data = [
            {"sample": group["sample"]} | self._encoded(self.search(module, frozen, group), group) for group in groups
        ]
        kept = map_tensors({name: batch[name] for name in ("frozen", "terms", "noise")}, lambda t: t.flatten(0, 1))
        return kept | {"data": cat(data), "distilled": torch.ones_like(kept["terms"], dtype=torch.bool)}

    def search(self, model: Callable, frozen: Callable, group: Batch) -> Tensor:
        """What was found of one group, as its "start"."""
        data, terms, noise = {"sample": group["sample"]}, group["terms"], group["noise"]
        with torch.no_grad():
            target = self.loss.predict(frozen, data | group["asked"], terms, noise)
        vectors = group["start"].detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([vectors], lr=self.rate)
        with torch.enable_grad():
            for _ in range(self.steps):
                values = self.loss(model, data | self._encoded(vectors, group), terms, noise, target)
                (gradient,) = torch.autograd.grad(GRADIENT_SCALE * values.mean(), [vectors])
                vectors.grad = gradient.sign() if self.steps == 1 else gradient / GRADIENT_SCALE
                optimizer.step()
        return vectors.detach()

    def _encoded(self, vectors: Tensor, group: Batch) -> Batch:
        """In the precision and on the device of the samples; without a graph where the vectors take no gradient."""
        with torch.set_grad_enabled(vectors.requires_grad):
            encoded = self.encode(vectors, group["rows"].tolist())
            return map_tensors(encoded, lambda tensor: tensor.to(group["sample"]))
