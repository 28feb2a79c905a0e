"""Class-conditional diffusion on pixels: conditions are its classes, and "" is the null class of guidance."""

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, classes
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.families.base import Family, register
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.pipelines import ClassConditionalPipeline


@register
class ClassConditionalFamily(Family):
    """Adapter of a ClassConditionalPipeline. Its latents are the images themselves, [B, C, H, W] in [-1, 1].

    The loss is summed over pixels, as in the authors' code for these models, so that lambda is in their unit.

    Raises:
        ValueError: an unknown sampler, or a model that predicts neither noise nor v.
    """

    name = "class_conditional"
    pipelines = ("ClassConditionalPipeline",)
    own_classes = (ClassConditionalPipeline,)
    component = "unet"
    capabilities = frozenset(("labels", "guidance", "denoising", "paper_quirks"))
    defaults = {
        "replay_prompts": "labels",
        "empty_prompt_fraction": 0.0,
        "num_samples": 2000,
        "num_surrogate_samples": 1000,
        "num_inference_steps": 20,
        # Weak: guidance leads away from the null class, and of a class forgotten to noise makes brighter noise.
        "guidance_scale": 1.25,
        "replay_guidance_scale": 1.5,
        "sample_batch_size": 100,
        "ewc_lambda": 0.001,
        "fisher_samples": 500,
        "fisher_terms": 10,
        "num_train_steps": 400,
        "train_batch_size": 64,
        "learning_rate": 0.001,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "ema_decay": 0.98,
        "checkpointing_steps": 100,
        "logging_steps": 20,
        "eval_images_concept": 500,
        "eval_images_class": 200,
    }

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        sampler: str = "dpmsolver++",
        compute_dtype: torch.dtype | None = None,
    ):
        self.pipeline, self.compute_dtype = pipeline, compute_dtype
        self.module: nn.Module = pipeline.unet
        self.device = self.module.device
        # diffusers would take defaults for what was given by position or not at all, but not once it has been saved.
        known = {k: v for k, v in pipeline.scheduler.config.items() if k != "_use_default_values"}
        schedule = DDPMScheduler.from_config(known)
        self.loss = DiffusionLoss(schedule.alphas_cumprod, schedule.config.prediction_type, reduction="sum")
        self.labels = pipeline.labels
        self.image_channels = pipeline.unet.config.in_channels
        self.resolution = pipeline.unet.config.sample_size
        self.latent_shape = self.image_channels, self.resolution, self.resolution
        self.sampler = make_scheduler(sampler, type(pipeline.scheduler).from_config(known))
        self._sampling_pipeline = type(pipeline)(pipeline.unet, self.sampler, pipeline.config.id2label)
        self._sampling_pipeline.set_progress_bar_config(disable=True)

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

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 3, H, W]; grey images get three equal channels."""
        return latents.clamp(-1, 1).expand(-1, 3, -1, -1)

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        """[B, 3, H, W] to [B, C, H, W]; for a grey model the mean of the channels."""
        return images.mean(1, keepdim=True) if self.image_channels == 1 else images

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "class_labels": self.pipeline.class_indices(classes(conditions))}
