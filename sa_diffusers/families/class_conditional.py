"""Class-conditional diffusion on pixels: conditions are its classes, and "" is the null class of guidance."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, classes
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.families.base import PixelFamily, register
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.pipelines import ClassConditionalPipeline


@register
class ClassConditionalFamily(PixelFamily):
    """Adapter of a ClassConditionalPipeline. Its latents are the images themselves, [B, C, H, W] in [-1, 1].

    The loss is summed over pixels, as in the authors' code for these models, so that lambda is in their unit. A model
    that predicts neither noise nor v is a ValueError.
    """

    name = "class_conditional"
    pipelines = ("ClassConditionalPipeline",)
    own_classes = (ClassConditionalPipeline,)
    component = "unet"
    capabilities = frozenset(("labels", "guidance", "denoising", "paper_quirks"))
    defaults = read_yaml("bundled/families/class_conditional.yaml")

    labels = property(attrgetter("pipeline.labels"))
    image_channels = property(attrgetter("module.config.in_channels"))
    resolution = property(attrgetter("module.config.sample_size"))

    def set_up_drawing(self, sampler: str | None) -> None:
        pipeline = self.pipeline
        schedule = self._schedule()
        if schedule.get("clip_sample"):  # by the one name that all samplers know
            schedule |= {"thresholding": True, "sample_max_value": schedule.get("clip_sample_range", 1.0)}
        self.sampler = make_scheduler(sampler or "dpmsolver++", type(pipeline.scheduler).from_config(schedule))
        self._sampling_pipeline = type(pipeline)(pipeline.unet, self.sampler, pipeline.config.id2label)
        self._sampling_pipeline.set_progress_bar_config(disable=True)

    def _schedule(self) -> dict[str, Any]:
        # diffusers would take defaults for what was given by position or not at all, but not once it has been saved.
        return {k: v for k, v in self.pipeline.scheduler.config.items() if k != "_use_default_values"}

    def make_loss(self) -> DiffusionLoss:
        schedule = DDPMScheduler.from_config(self._schedule())
        return DiffusionLoss(schedule.alphas_cumprod, schedule.config.prediction_type, reduction="sum")

    @torch.no_grad()
    def draw(
        self,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        with autocast_forward(self.module, self.compute_dtype):
            images = self._sampling_pipeline(
                classes(conditions),
                guidance_scale,
                num_inference_steps,
                negative_labels=classes(negative) if negative else None,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images
        return 2 * images - 1

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "class_labels": self.pipeline.class_indices(classes(conditions))}
