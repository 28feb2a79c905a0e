"""Erased Stable Diffusion (Gandikota et al., ICCV 2023), by itself and as a third term of Selective Amnesia."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch, cat, conditions_of
from sa_diffusers.core.losses import DenoisingLoss
from sa_diffusers.core.objectives.base import Frozen, Objective
from sa_diffusers.core.objectives.ewc import ElasticWeightConsolidation
from sa_diffusers.core.objectives.selective_amnesia import SelectiveAmnesia


class ESD(Objective):
    """Predict under the concept what the frozen model predicts when it is guided away from it:

        | eps(x_t, t, concept) - [eps*(x_t, t, "") - eta (eps*(x_t, t, concept) - eps*(x_t, t, ""))] |^2,

    with the loss's own reduction over data and a mean over the batch; the same for v and for the velocity of a flow,
    since the weights in the bracket sum to 1. x_t is drawn by the model that is being trained: from pure noise, guided
    towards the concept, to one of the sampler's noise levels, with no gradient through it. The level is the same for
    the whole batch of an optimiser step, so that all processes run the model equally often; the timesteps are drawn
    one by one from those that the level stands for. The model must draw nothing for itself: switch dropout off.

    A batch is {"concept": Batch, "empty": Batch}: the same number of rows under prompts that name the concept and
    under the empty prompt. Of their "sample" [B, C, H, W] only the shape counts. The defaults are the authors'.

    Args:
        loss: gives the number of timesteps and the reduction.
        frozen: the model before training, to be called like it.
        scheduler: a DDIMScheduler of the model's own noise schedule and prediction type, or Euler's method of a flow;
            it is copied.
        negative_guidance: eta, >= 0; 0 replaces the concept by the empty prompt.
        start_guidance: guidance scale, >= 0, that x_t is drawn with, as in diffusers (1: none).
        num_inference_steps: noise levels of the sampler, in [2, T].
        authors_latents: draw x_t as the authors' code does: noise enters at the second of the levels, and sampling
            goes on for two levels beyond the one that the timestep is drawn for, so that x_t is cleaner than the model
            is told. The paper says nothing of either.

    Raises:
        ValueError: a number out of range. From `draw`: parts of a batch that differ in shape.
    """

    def __init__(
        self,
        loss: DenoisingLoss,
        frozen: Frozen,
        scheduler: Any,
        negative_guidance: float = 1.0,
        start_guidance: float = 3.0,
        num_inference_steps: int = 50,
        authors_latents: bool = False,
    ):
        for name, value in (("negative_guidance", negative_guidance), ("start_guidance", start_guidance)):
            if value < 0:
                raise ValueError(f"expected {name} >= 0, got {value}")
        if not 2 <= num_inference_steps <= loss.num_terms:
            bound = f"from 2 to the model's {loss.num_terms} timesteps"
            raise ValueError(f"expected num_inference_steps {bound}, got {num_inference_steps}")
        self.loss, self.frozen = loss, frozen
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_inference_steps)
        self.negative_guidance, self.start_guidance = negative_guidance, start_guidance
        self.num_levels, self.authors_latents = num_inference_steps, authors_latents

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        sample = batch["concept"]["sample"]
        if sample.shape != (other := batch["empty"]["sample"].shape):
            given = f"samples {list(other)} and {list(sample.shape)}"
            raise ValueError(f"expected as many rows under the empty prompt as under the concept, got {given}")
        level = int(torch.randint(self.num_levels, (1,), generator=generator))
        first, end = (n * self.loss.num_terms // self.num_levels for n in (level, level + 1))
        return {name: conditions_of(part) for name, part in batch.items()} | {
            "noise": self.loss.sample_noise(batch["concept"], generator),
            "level": torch.full((len(sample),), level),
            "terms": torch.randint(first, end, (len(sample),), generator=generator),
        }

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        noisy, terms = self.partly_denoised(model, batch), batch["terms"]
        with torch.no_grad():
            target = self._guided(self.frozen, noisy, self.loss.times(terms), batch, -self.negative_guidance)
        predicted = self.loss.call(model, noisy, self.loss.times(terms), batch["concept"])
        errors = (predicted - target).square().flatten(1)  # [B, C*H*W]
        return (errors.mean(1) if self.loss.reduction == "mean" else errors.sum(1)).mean(), {}

    @torch.no_grad()
    def partly_denoised(self, model: nn.Module, batch: Batch) -> Tensor:
        """x_t of a drawn batch, [B, C, H, W]."""
        sample = batch["noise"]
        self.scheduler.set_timesteps(self.num_levels)  # those of flows count their steps
        for timestep in self._timesteps(int(batch["level"][0])):
            times = torch.full((len(sample),), timestep, device=sample.device)
            predicted = self._guided(model, sample, times, batch, self.start_guidance)
            sample = self.scheduler.step(predicted, timestep, sample).prev_sample
        return sample

    def _guided(self, model: Callable, noisy: Tensor, times: Tensor, batch: Batch, scale: float) -> Tensor:
        """prediction("") + scale * (prediction(concept) - prediction("")), [B, C, H, W]; a negative one leads away."""
        conditions = cat([batch["empty"], batch["concept"]])
        both = self.loss.call(model, torch.cat([noisy, noisy]), torch.cat([times, times]), conditions)
        away, towards = both.chunk(2)
        return away + scale * (towards - away)

    def _timesteps(self, level: int) -> list[int | float]:
        """Those at which the sampler steps on its way to a level; level 0 is the least noisy."""
        timesteps = self.scheduler.timesteps.tolist()
        if self.authors_latents:
            return timesteps[1 : 1 + self.num_levels - level]
        return timesteps[: self.num_levels - 1 - level]


class SelectiveAmnesiaWithESD(SelectiveAmnesia):
    """Selective Amnesia's loss + esd_weight * ESD's, for concepts that appear without being named.

    A batch is that of `SelectiveAmnesia` and {"esd": a batch of `ESD`}.

    Args:
        esd: its loss is that of the other terms as well, and esd_weight is in its unit.
        ewc, replay_weight, frozen: as of `SelectiveAmnesia`.
        esd_weight: >= 0; 0 leaves ESD out.
    """

    def __init__(
        self,
        esd: ESD,
        ewc: ElasticWeightConsolidation | None,
        replay_weight: float = 1.0,
        frozen: Frozen | None = None,
        esd_weight: float = 1.0,
    ):
        if esd_weight < 0:
            raise ValueError(f"expected esd_weight >= 0, got {esd_weight}")
        super().__init__(esd.loss, ewc, replay_weight, frozen)
        self.esd, self.esd_weight = esd, esd_weight

    def attach(self, parameters: Mapping[str, Tensor], module: nn.Module) -> None:
        super().attach(parameters, module)
        self.esd.attach(parameters, module)  # whose frozen model may be the only one

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        parts = super().draw(batch, generator)
        return parts | {"esd": self.esd.draw(batch["esd"], generator)} if self.esd_weight else parts

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = super().__call__(model, {name: part for name, part in batch.items() if name != "esd"})
        if not self.esd_weight:
            return total, parts
        value, _ = self.esd(model, batch["esd"])
        return total + self.esd_weight * value, parts | {"esd_loss": value.detach()}
