"""Selective Amnesia (Heng & Soh, NeurIPS 2023), and the naive objective that it replaces."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch, cat, conditions_of, take
from sa_diffusers.core.losses import Loss
from sa_diffusers.core.objectives.base import Frozen, Objective
from sa_diffusers.core.objectives.ewc import ElasticWeightConsolidation


# Of each part of a batch, in the log.
LOSSES = {
    "surrogate": "surrogate_loss", "replayed": "replay_loss", "adversary": "adversary_loss", "open": "open_loss",
}  # fmt: skip


class Term(Protocol):
    """A further term, for a diffusion loss: it makes of a part of the batch one like the other two.

    Attributes:
        part: its name there and in LOSSES.
    """

    part: str
    weight: float

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        """The part with all its randomness."""
        ...

    def __call__(self, model: nn.Module, frozen: Callable, batch: Batch) -> Batch:
        """A part as of `SelectiveAmnesia`, drawn; with "target" where it has one of its own."""
        ...


class SelectiveAmnesia(Objective):
    """loss(surrogate | concept) + replay_weight * loss(replay) + EWC: minus the paper's Eq. 4, but without its 1/2.

    A batch is {"surrogate": Batch, "replayed": Batch}: surrogate data under the concept's condition, and the model's
    own samples of everything else under their own conditions. All go through the model in one forward pass. Timesteps
    are drawn uniformly and independently for the two, as in the authors' Stable Diffusion code. A batch may hold parts
    of further terms, each with its weight.

    Args:
        loss: the model's negative ELBO.
        ewc: the penalty on weight changes, or None for none.
        replay_weight: the paper's gamma; 0 leaves replay out of the forward pass altogether.
        frozen: the model before forgetting, for a diffusion loss. Samples that a part of the batch marks, "distilled"
            [B] of booleans, should then be denoised as it denoises them, in place of towards the target that was
            drawn: under their own conditions, or under those that the part holds in "frozen" (the surrogate's prompt
            where the sample stands under the concept's). That is distillation, no longer the paper's term; only for
            an exact model, unguided samples and their own conditions would the gradient's expectation stay
            (Rao-Blackwell).
        terms: further ones, which need `frozen`.
    """

    surrogate_sign = 1  # of the first term

    def __init__(
        self,
        loss: Loss,
        ewc: ElasticWeightConsolidation | None,
        replay_weight: float = 1.0,
        frozen: Frozen | None = None,
        terms: Sequence[Term] = (),
    ):
        if replay_weight < 0:
            raise ValueError(f"expected replay_weight >= 0, got {replay_weight}")
        self.loss, self.ewc, self.replay_weight, self.frozen = loss, ewc, replay_weight, frozen
        self.terms = {term.part: term for term in terms}
        self._attached = False

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        parts = {}
        for name in ("surrogate", "replayed") if self.replay_weight else ("surrogate",):
            data = dict(batch[name])
            size = len(data["sample"])
            distilled, frozen = data.pop("distilled", torch.zeros(size, dtype=torch.bool)), data.pop("frozen", None)
            parts[name] = {
                "distilled": distilled,
                "frozen": frozen or conditions_of(data),
                "data": data,
                "terms": self.loss.sample_terms(size, generator),
                "noise": self.loss.sample_noise(data, generator),
            }
        return parts | {n: term.draw(batch[n], generator) for n, term in self.terms.items() if n in batch}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        means = self.mean_losses(model, batch)
        return self.total(means), {name: mean.detach() for name, mean in means.items()}

    def total(self, means: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the parts' mean losses, a scalar."""
        total = self.surrogate_sign * means["surrogate_loss"]
        if self.replay_weight:
            total = total + self.replay_weight * means["replay_loss"]
        for term in self.terms.values():
            total = total + term.weight * means.get(LOSSES[term.part], 0)
        return total

    def mean_losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The mean loss of each part of a drawn batch, "surrogate_loss" and "replay_loss", from one forward pass."""
        made = {name: self.terms[name](model, self.frozen, batch[name]) for name in self.terms if name in batch}
        parts = list({**batch, **made}.values())
        data = cat([part["data"] for part in parts])
        terms = torch.cat([part["terms"] for part in parts])
        noise = torch.cat([part["noise"] for part in parts])
        target = {} if self.frozen is None else {"target": self._target(parts, data, terms, noise)}
        values = self.loss(model, data, terms, noise, **target).split([len(part["terms"]) for part in parts])
        return {LOSSES[name]: value.mean() for name, value in zip(batch, values, strict=True)}

    @torch.no_grad()
    def _target(self, parts: list[Batch], data: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        """What was drawn, but the frozen model's prediction for the samples that are marked."""
        target = self.loss.target(data, terms, noise).clone()
        marked = torch.cat([part["distilled"] for part in parts])
        shown = marked.clone()
        # The frozen model's weights may be in parts: every process must call it, for nothing where none is marked.
        shown[0] |= self._attached and not marked.any()
        if shown.any():
            chosen = take(cat([part["frozen"] for part in parts]), shown) | {"sample": data["sample"][shown]}
            predicted = self.loss.predict(self.frozen, chosen, terms[shown], noise[shown])
            target[marked] = predicted[marked[shown]]
        for part, rows in zip(parts, target.split([len(part["terms"]) for part in parts]), strict=True):
            rows.copy_(part.get("target", rows))
        return target

    def attach(self, parameters: Mapping[str, Tensor], module: nn.Module) -> None:
        super().attach(parameters, module)
        self._attached = True


class NaiveForgetting(SelectiveAmnesia):
    """-loss(concept) + replay_weight * loss(replay) + EWC: minus the paper's Eq. 3, but without its 1/2.

    The first term has no bound, and the paper shows that it ruins the rest while the concept stays (Fig. 2): this is
    here to compare with. "surrogate" of a batch holds samples of the concept itself under its own condition. The log
    gives both losses with their sign unchanged.
    """

    surrogate_sign = -1
