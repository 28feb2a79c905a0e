"""Stable Diffusion that fills holes: its UNet is also shown the mask and what it leaves, in 9 channels together."""

from collections.abc import Sequence
from functools import cached_property

import torch
from diffusers import DDPMScheduler, StableDiffusionInpaintPipeline
from torch import Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import FillingLoss
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.completion.denoising import FillingFamily
from sa_diffusers.families.requirements import check_parts, pixels_a_latent
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.io.hub import read_part
from sa_diffusers.models.precision import autocast_forward, in_precision, on_device


PIXELS_AT_ONCE = 2**20


@register
class StableDiffusionInpaintFamily(FillingFamily):
    """Adapter of a StableDiffusionInpaintPipeline, under the empty prompt and without guidance.

    What is visible is pasted back. The VAE encodes to the posterior's mode; the safety checker is never run.
    """

    name = "stable_diffusion_inpaint"
    pipelines = ("StableDiffusionInpaintPipeline",)
    helpers = ("text_encoder", "safety_checker", "image_encoder")
    defaults = read_yaml("bundled/families/stable_diffusion_inpaint.yaml")

    cell = property(lambda self: self.pipeline.vae_scale_factor)
    resolution = property(lambda self: self.module.config.sample_size * self.cell)

    def set_up_drawing(self, sampler: str | None) -> None:
        self.sampler = make_scheduler(sampler or self.defaults["sampler"], self.pipeline.scheduler)
        # Without the text encoder, whose precision would be the pictures'.
        unused = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "requires_safety_checker": False}
        parts = {"scheduler": self.sampler, **unused}
        self._filling = StableDiffusionInpaintPipeline(**self.pipeline.components | parts)
        self._filling.set_progress_bar_config(disable=True)

    def make_loss(self) -> FillingLoss:
        schedule, size = DDPMScheduler.from_config(self.pipeline.scheduler.config), self.module.config.sample_size
        shape = self.pipeline.vae.config.latent_channels, size, size
        return FillingLoss(schedule.alphas_cumprod, schedule.config.prediction_type, self._latents, shape)

    @cached_property
    @torch.no_grad()
    def _told(self) -> Tensor:
        """The empty prompt's embeddings [1, L, D], on the CPU."""
        with on_device(self.pipeline.text_encoder, self.device):
            return self.pipeline.encode_prompt([""], self.device, 1, False)[0].float().cpu()

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        told = self._told.expand(len(latents), -1, -1)
        return {**super().batch(latents, conditions), "encoder_hidden_states": told}

    @torch.no_grad()
    def _latents(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        parts = images.to(vae.device, vae.dtype).split(self._at_once)
        modes = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
        return (modes * vae.config.scaling_factor).to(images)

    @property
    def _at_once(self) -> int:
        return max(1, PIXELS_AT_ONCE // self.resolution**2)

    @torch.no_grad()
    def complete(
        self, images: Tensor, conditions: Sequence[Condition], seeds: Sequence[int], steps: int | None = None
    ) -> Tensor:
        steps, holes, filled = steps or self.defaults["num_inference_steps"], self.holes(conditions), []
        with autocast_forward(self.module, self.compute_dtype), in_precision(self.pipeline.vae, self.module.dtype):
            for start in range(0, len(images), self._at_once):
                rows = slice(start, start + self._at_once)
                made = self._filling(
                    prompt_embeds=self._told.expand(len(images[rows]), -1, -1).to(self.device, self.module.dtype),
                    image=(images[rows] + 1) / 2,
                    mask_image=holes[rows].float(),
                    height=self.resolution,
                    width=self.resolution,
                    num_inference_steps=steps,
                    guidance_scale=1.0,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
                    output_type="pt",
                ).images
                filled.append(2 * made.float().cpu() - 1)
        return torch.where(holes, torch.cat(filled), images)

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        names = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
        parts = {name: configurations(name) for name in names}
        if absent := [name for name, part in parts.items() if part["_class_name"] is None]:
            raise ValueError(f"the pipeline has no {absent[0]}; load it with all of its components")
        latents, channels = parts["vae"].get("latent_channels", 4), parts["unet"].get("in_channels", 4)
        if channels != 2 * latents + 1:
            raise ValueError(
                f"the pipeline's UNet has in_channels {channels}, expected {2 * latents + 1}: latents, a mask, and "
                "latents of what is visible; other models fill holes without having learned it"
            )
        plain = {**parts["unet"], "in_channels": latents}
        check_parts(plain, parts["vae"], parts["scheduler"], parts["text_encoder"].get("hidden_size"))

    @classmethod
    def resolution_of(cls, source: str) -> int | None:
        size = read_part(source, "unet").get("sample_size")
        return size * pixels_a_latent(read_part(source, "vae")) if isinstance(size, int) else None
