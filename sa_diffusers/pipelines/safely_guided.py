"""The pipelines that safety guidance leads: of each family that guides by two predictions in one batch, a class."""

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    T5TokenizerFast,
)

from sa_diffusers.pipelines.safe_guidance import SAFETY_CONCEPT, SafeGuidance


# diffusers reads a pipeline's parts and options off the signature of its own __init__.


class SafeGuidancePipeline(SafeGuidance, StableDiffusionPipeline):
    """Stable Diffusion that is led away from a concept while it draws; its weights are those of the stock pipeline.

    A step costs three evaluations of the UNet in place of two. `StableDiffusionPipeline` loads what this one saves,
    and draws without the guidance.

    Takes what `StableDiffusionPipeline` takes, and:

    Args:
        safety_concept: text of what to lead away from.
        safety_level: "weak", "medium", "strong" or "max".

    Raises:
        ValueError: another level, an empty concept.
    """

    reads = ("encoder_hidden_states",)

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
        safety_concept: str = SAFETY_CONCEPT,
        safety_level: str = "medium",
    ):
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
            requires_safety_checker,
        )  # fmt: skip
        self._lead_away(safety_concept, safety_level)


class SafeGuidanceXLPipeline(SafeGuidance, StableDiffusionXLPipeline):
    """The same of Stable Diffusion XL: takes what `StableDiffusionXLPipeline` takes, and a concept and a level."""

    reads = ("encoder_hidden_states", "text_embeds")

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        safety_concept: str = SAFETY_CONCEPT,
        safety_level: str = "medium",
    ):
        super().__init__(
            vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder,
            feature_extractor, force_zeros_for_empty_prompt, add_watermarker,
        )  # fmt: skip
        self._lead_away(safety_concept, safety_level)


class SafeGuidanceSD3Pipeline(SafeGuidance, StableDiffusion3Pipeline):
    """The same of Stable Diffusion 3: takes what `StableDiffusion3Pipeline` takes, and a concept and a level."""

    guided_part = "transformer"
    reads = ("encoder_hidden_states", "pooled_projections")
    encodes_with = ("prompt_2", "prompt_3")

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer_2: CLIPTokenizer | None,
        text_encoder_3: T5EncoderModel | None,
        tokenizer_3: T5TokenizerFast | None,
        image_encoder: SiglipVisionModel | None = None,
        feature_extractor: SiglipImageProcessor | None = None,
        safety_concept: str = SAFETY_CONCEPT,
        safety_level: str = "medium",
    ):
        super().__init__(
            transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3,
            tokenizer_3, image_encoder, feature_extractor,
        )  # fmt: skip
        self._lead_away(safety_concept, safety_level)
