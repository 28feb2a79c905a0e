"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents, conditioned on CLIP text embeddings."""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from sa_diffusers.core.batches import Batch
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.requirements import check_parts
from sa_diffusers.families.scopes import SCOPES
from sa_diffusers.families.text_to_image.safely_guided import SafelyGuidedFamily
from sa_diffusers.pipelines.safely_guided import SafeGuidancePipeline


@register
class StableDiffusionFamily(SafelyGuidedFamily):
    """Adapter of a StableDiffusionPipeline. Of the samplers "ddim" is the authors'."""

    name = "stable_diffusion"
    pipelines = ("StableDiffusionPipeline", "SafeGuidancePipeline")
    own_classes = (SafeGuidancePipeline,)
    stock = StableDiffusionPipeline
    component = "unet"
    helpers = ("text_encoder", "vae", "safety_checker", "image_encoder")
    scopes = SCOPES

    def drawing_pipeline(self, cls: type[DiffusionPipeline], **options: Any) -> DiffusionPipeline:
        return super().drawing_pipeline(cls, requires_safety_checker=False, **options)

    def encode_prompts(self, prompts: Sequence[str]) -> Batch:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(list(prompts), self.device, 1, False)[0]}

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        parts = cls.parts(configurations)
        check_parts(parts["unet"], parts["vae"], parts["scheduler"], parts["text_encoder"].get("hidden_size"))
