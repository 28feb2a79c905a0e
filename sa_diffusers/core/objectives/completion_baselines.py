"""What Li et al. (ICLR 2024, arXiv 2402.00351, section 4.1) compare forgetting in the encoder with."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch, take, to
from sa_diffusers.core.losses import FillingLoss, PatchLoss
from sa_diffusers.core.objectives.base import Objective
from sa_diffusers.core.objectives.encoder import EncoderForgetting, Noised, with_sparsity


class OutputForgetting(Objective):
    """w L(retain) + alpha L(forget, other targets) + gamma |theta|_1: by outputs, or by the training loss L itself.

    What L draws, `noised` adds; what takes the place of pictures to forget is seen at their noise and noise level.

    Args:
        loss: the model's own.
        frozen: the model before forgetting; for other targets than retain it is not read.
        targets: of the pictures to forget. own: themselves, to be made unlikely, so that the second term has a minus
            (Max Loss); noise: the surrogate in the holes (Noisy Label); retain: what the frozen model makes of the
            pictures to retain of the same batch (Retain Label); none: no second term.
        alpha, retain_weight: of the two terms, not below 0.
        weights: what is trained, for its l1 norm.
        noised: as of `EncoderForgetting`.
    """

    def __init__(
        self,
        loss: PatchLoss | FillingLoss,
        frozen: nn.Module | None,
        targets: Literal["own", "noise", "retain", "none"],
        alpha: float,
        retain_weight: float,
        weights: Mapping[str, Tensor],
        noised: Noised = lambda batch, _: batch,
    ):
        self.loss, self.frozen, self.targets, self.weights = loss, frozen, targets, weights
        self.noised = noised
        self.alpha, self.retain_weight = alpha, retain_weight

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        return {**batch, **{name: self.noised(batch[name], generator) for name in ("forget", "retain")}}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        parts, forget = {"retain_loss": self._mean(model, batch["retain"], None)}, batch["forget"]
        drawn = {name: forget[name] for name in ("terms", "noise") if name in forget}
        total = self.retain_weight * parts["retain_loss"]
        if self.targets != "none":
            with torch.no_grad():
                forget, target = {
                    "own": lambda: (forget, None),
                    "noise": lambda: self.loss.towards(forget, batch["surrogate"]["sample"]),
                    "retain": lambda: (forget, self.loss.outputs(self.frozen, batch["retain"] | drawn)),
                }[self.targets]()
            parts["forget_loss"] = self._mean(model, forget, target)
            total = total + (-self.alpha if self.targets == "own" else self.alpha) * parts["forget_loss"]
        return with_sparsity(total, parts, batch, self.weights)

    def _mean(self, model: nn.Module, batch: Batch, target: Tensor | None) -> Tensor:
        nothing = torch.zeros(len(batch["sample"]), device=batch["sample"].device)
        terms, noise = batch.get("terms", nothing.long()), batch.get("noise", nothing)
        return self.loss(model, batch, terms, noise, target).mean()


class RandomEncoder(EncoderForgetting):
    """As `EncoderForgetting`, towards normal noise of the mean and spread of the frozen encoder's features of x_f.

    Each part of a batch that is shared has its own mean and spread.
    """

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        batch = super().draw(batch, generator)
        device, size = next(self.frozen.parameters()).device, len(batch["forget"]["sample"])
        with torch.no_grad():
            shapes = [part.shape[1:] for part in self.features(self.frozen, to(take(batch["forget"], [0]), device))]
        drawn = {str(depth): torch.randn(size, *shape, generator=generator) for depth, shape in enumerate(shapes)}
        return {**batch, "surrogate": batch["forget"], "drawn": drawn}

    def targets(self, batch: Batch, kept: list[Batch]) -> list[Tensor]:
        found = super().targets(batch, kept)
        for part, noise in zip(found, batch["drawn"].values(), strict=True):
            own = part[: len(noise)]
            part[: len(noise)] = noise * own.std() + own.mean()
        return found
