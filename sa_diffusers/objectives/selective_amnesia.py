"""Selective Amnesia (Heng & Soh, NeurIPS 2023)."""

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.losses import NegativeELBO

from .base import NestedBatch
from .ewc import ElasticWeightConsolidation


class SelectiveAmnesia:
    """loss(surrogate | concept) + replay_weight * loss(replay) + EWC: minus the paper's Eq. 4, but without its 1/2.

    A batch is {"surrogate": Batch, "replay": Batch}: surrogate data under the concept's condition, and the model's own
    samples of everything else under their own conditions. Both go through the model in one forward pass. Timesteps are
    drawn uniformly and independently for the two, as in the authors' Stable Diffusion code.

    Args:
        loss: the model's negative ELBO.
        ewc: the penalty on weight changes, or None for none.
        replay_weight: the paper's gamma; 0 leaves replay out of the forward pass altogether.
    """

    def __init__(self, loss: NegativeELBO, ewc: ElasticWeightConsolidation | None, replay_weight: float = 1.0):
        if replay_weight < 0:
            raise ValueError(f"expected replay_weight >= 0, got {replay_weight}")
        self.loss, self.ewc, self.replay_weight = loss, ewc, replay_weight

    def draw(self, batch: NestedBatch, generator: Generator) -> NestedBatch:
        parts = {}
        for name in ("surrogate", "replay") if self.replay_weight else ("surrogate",):
            terms = torch.randint(self.loss.num_terms, (len(batch[name]["sample"]),), generator=generator)
            parts[name] = {
                "data": batch[name],
                "terms": terms,
                "noise": self.loss.sample_noise(batch[name], generator),
            }
        return parts

    def __call__(self, model: nn.Module, batch: NestedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        parts = list(batch.values())
        data = {key: torch.cat([part["data"][key] for part in parts]) for key in parts[0]["data"]}
        terms = torch.cat([part["terms"] for part in parts])
        noise = torch.cat([part["noise"] for part in parts])
        values = self.loss(model, data, terms, noise).split([len(part["terms"]) for part in parts])
        means = {f"{name}_loss": value.mean() for name, value in zip(batch, values, strict=True)}
        total = means["surrogate_loss"]
        if self.replay_weight:
            total = total + self.replay_weight * means["replay_loss"]
        return total, {name: mean.detach() for name, mean in means.items()}

    def add_gradient(self) -> None:
        if self.ewc is not None:
            self.ewc.add_gradient()

    def regularisation(self) -> dict[str, Tensor]:
        return {} if self.ewc is None else {"ewc": self.ewc.value()}
