"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents, conditioned on CLIP text embeddings."""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from sa_diffusers.core.batches import Batch
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.requirements import check_parts
from sa_diffusers.families.scopes import SCOPES
from sa_diffusers.families.text_to_image.family import TextToImageFamily
from sa_diffusers.pipelines.safe_guidance import SAFETY_LEVELS, SafeGuidancePipeline


@register
class StableDiffusionFamily(TextToImageFamily):
    """Adapter of a StableDiffusionPipeline. Of the samplers "ddim" is the authors'."""

    name = "stable_diffusion"
    pipelines = ("StableDiffusionPipeline", "SafeGuidancePipeline")
    own_classes = (SafeGuidancePipeline,)
    stock = StableDiffusionPipeline
    component = "unet"
    helpers = ("text_encoder", "vae", "safety_checker", "image_encoder")
    scopes = SCOPES
    capabilities = TextToImageFamily.capabilities | {"safe_guidance"}

    def drawing_pipeline(self, cls: type[DiffusionPipeline], **options: Any) -> DiffusionPipeline:
        self._safe = isinstance(self.pipeline, SafeGuidancePipeline)
        return super().drawing_pipeline(SafeGuidancePipeline if self._safe else cls, requires_safety_checker=False)

    def encode_prompts(self, prompts: Sequence[str]) -> Batch:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(list(prompts), self.device, 1, False)[0]}

    def drawing_options(self, guidance_scale: float, num_inference_steps: int) -> dict[str, Any]:
        """Of a SafeGuidancePipeline also its safety, whose warm-up is the paper's share of the steps."""
        options = super().drawing_options(guidance_scale, num_inference_steps)
        if not self._safe:
            return options
        config = self.pipeline.config
        avoided = self.embed([config.safety_concept])["encoder_hidden_states"].to(self.device)
        settings = SAFETY_LEVELS[config.safety_level].for_steps(num_inference_steps)
        return options | {"safety": settings, "safety_concept_embeds": avoided}

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        parts = cls.parts(configurations)
        check_parts(parts["unet"], parts["vae"], parts["scheduler"], parts["text_encoder"].get("hidden_size"))

    def safely_guided(self, concept: str, level: str, sampler: str) -> "StableDiffusionFamily":
        """The same model in a pipeline that is led away from a text while it draws; `level` of SAFETY_LEVELS."""
        pipeline = SafeGuidancePipeline(
            **self.pipeline.components,
            requires_safety_checker=self.pipeline.config.requires_safety_checker,
            safety_concept=concept,
            safety_level=level,
        )
        return type(self)(pipeline, sampler, self.compute_dtype)
