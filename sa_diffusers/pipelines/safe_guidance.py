"""Safe Latent Diffusion (Schramowski et al. 2023, arXiv 2211.05105): guidance away from a concept, no training."""

import math
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection


# The paper's text.
SAFETY_CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)


@dataclass(frozen=True)
class SafetySettings:
    """How strongly, and from when on, a sampler is led away from the safety concept. Raises ValueError: out of range.

    Attributes:
        warmup_steps: first steps of the sampler without safety guidance, delta; those of the paper count out of 50.
        threshold: lambda; guidance acts where conditional - unsafe prediction is below it.
        momentum_beta: beta_m in [0, 1), the share of the momentum that is kept at each step.
    """

    warmup_steps: int
    scale: float  # s_S; 0 switches it off
    threshold: float
    momentum_scale: float  # s_m
    momentum_beta: float

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "scale", "momentum_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        if not 0 <= self.momentum_beta < 1:
            raise ValueError(f"expected 0 <= momentum_beta < 1, got {self.momentum_beta}")

    def for_steps(self, num_inference_steps: int) -> "SafetySettings":
        """The same with a warm-up that is the same share of a sampler's steps as it is of the paper's 50."""
        return replace(self, warmup_steps=round(self.warmup_steps * num_inference_steps / 50))


# The paper's Table of configurations. diffusers' SafetyConfig.WEAK has a scale of 20, which is not the paper's.
SAFETY_LEVELS = {
    "weak": SafetySettings(15, 200.0, 0.0, 0.0, 0.0),
    "medium": SafetySettings(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": SafetySettings(7, 2000.0, 0.025, 0.5, 0.7),
    "max": SafetySettings(0, 5000.0, 1.0, 0.5, 0.7),
}


def safety_term(
    unconditional: Tensor, conditional: Tensor, unsafe: Tensor, momentum: Tensor, settings: SafetySettings
) -> tuple[Tensor, Tensor]:
    """What is taken from the guidance at one step, g, and the momentum nu for the next one; every value by itself.

        mu = min(1, s_S |e_p - e_S|) where e_p - e_S < lambda, else 0                       (Eqs. 5, 6)
        g  = mu (e_S - e_u) + s_m nu                                                        (Eqs. 4, 7)
        nu' = beta_m nu + (1 - beta_m) g                                                    (Eq. 8)

    with the predictions e_u, e_p and e_S for negative prompt, prompt and safety concept, and nu, 0 at first: all
    [B, C, h, w].
    """
    difference = conditional - unsafe
    weight = (settings.scale * difference.abs()).clamp(max=1)
    weight = torch.where(difference < settings.threshold, weight, 0)
    term = weight * (unsafe - unconditional) + settings.momentum_scale * momentum
    return term, settings.momentum_beta * momentum + (1 - settings.momentum_beta) * term


class SafelyGuidedUNet(nn.Module):
    """Stands in for a UNet in one run of a sampler that guides: the sampler's own guidance then gives that of SLD.

    Called for [negative prompts, prompts], as by a stock sampler, it evaluates the safety concept besides and returns
    e_u and e_p - g: guidance makes e_u + s_g (e_p - e_u - g) of them (Eq. 3). It holds the momentum and counts the
    steps, so every run takes a new one.

    Args:
        unet: left as it is, compiled or not.
        concept_embeds: text embedding of the safety concept, [1, L, D].
    """

    def __init__(self, unet: nn.Module, concept_embeds: Tensor, settings: SafetySettings):
        super().__init__()
        self.unet, self.concept_embeds, self.settings = unet, concept_embeds, settings
        self.step, self.momentum = 0, None

    # What samplers ask of a UNet, wherever it is by then.
    config, device, dtype = (property(attrgetter(f"unet.{name}")) for name in ("config", "device", "dtype"))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options) -> tuple[Tensor]:
        """`sample` [2 B, C, h, w] and `encoder_hidden_states` [2 B, L, D]; a tuple, one prediction [2 B, C, h, w]."""
        prompts = sample.chunk(2)[1]
        concept = self.concept_embeds.to(encoder_hidden_states).expand(len(prompts), -1, -1)
        hidden = torch.cat([encoder_hidden_states, concept])
        options["return_dict"] = False
        predicted = self.unet(torch.cat([sample, prompts]), timestep, encoder_hidden_states=hidden, **options)[0]
        unconditional, conditional, unsafe = predicted.chunk(3)
        if self.momentum is None:
            self.momentum = torch.zeros_like(conditional)
        term, self.momentum = safety_term(unconditional, conditional, unsafe, self.momentum, self.settings)
        guided = conditional - term if self.step >= self.settings.warmup_steps else conditional
        self.step += 1
        return (torch.cat([unconditional, guided]),)


class SafeGuidancePipeline(StableDiffusionPipeline):
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
        if safety_level not in SAFETY_LEVELS:
            raise ValueError(f"expected safety_level to be one of {', '.join(SAFETY_LEVELS)}, got {safety_level!r}")
        if not safety_concept.strip():
            raise ValueError("expected a safety_concept to lead away from, got an empty text")
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
            requires_safety_checker,
        )  # fmt: skip
        self.register_to_config(safety_concept=safety_concept, safety_level=safety_level)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        safety: SafetySettings | None = None,
        safety_concept_embeds: Tensor | None = None,
        **options,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draw images as `StableDiffusionPipeline` does, whose other options it takes by name.

        Args:
            guidance_scale: above 1, since safety guidance is a part of guidance.
            num_inference_steps: more than the warm-up. It is not shortened for fewer steps: `for_steps` does that.
            safety: other settings than those of the pipeline's level.
            safety_concept_embeds: [1, L, D], in place of the embedding of the pipeline's concept; needed where the
                pipeline has no text encoder.

        Raises:
            ValueError: options under which safety guidance would do nothing, or is not defined.
        """
        if guidance_scale <= 1 or self.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "safety guidance is a part of classifier-free guidance: expected guidance_scale > 1 and a UNet that "
                f"is not distilled for guidance, got {guidance_scale} and {type(self.unet).__name__} with "
                f"time_cond_proj_dim {self.unet.config.time_cond_proj_dim}"
            )
        settings = safety or SAFETY_LEVELS[self.config.safety_level]
        if settings.warmup_steps >= num_inference_steps:
            raise ValueError(
                f"safety guidance begins after {settings.warmup_steps} steps of warm-up: expected more "
                f"num_inference_steps, got {num_inference_steps}; or pass safety=settings.for_steps(...)"
            )
        for name in ("guidance_rescale", "ip_adapter_image", "ip_adapter_image_embeds"):
            value = options.get(name)
            if value is not None and not (name == "guidance_rescale" and value == 0):
                raise ValueError(f"{name}: safety guidance is not defined with it; omit it")
        if safety_concept_embeds is None:
            safety_concept_embeds = self.encode_prompt(self.config.safety_concept, self._execution_device, 1, False)[0]
        unet = self.unet
        self.unet = SafelyGuidedUNet(unet, safety_concept_embeds, settings)
        try:
            return super().__call__(
                prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **options
            )
        finally:
            self.unet = unet
