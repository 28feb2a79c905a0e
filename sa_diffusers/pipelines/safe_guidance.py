"""Safe Latent Diffusion (Schramowski et al. 2023, arXiv 2211.05105): guidance away from a concept, no training."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn


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

    with the predictions e_u, e_p and e_S of the noise for negative prompt, prompt and safety concept, and nu, 0 at
    first: all [B, C, h, w]. Only differences of predictions count, so that each may lack the same.
    """
    difference = conditional - unsafe
    weight = (settings.scale * difference.abs()).clamp(max=1)
    weight = torch.where(difference < settings.threshold, weight, 0)
    term = weight * (unsafe - unconditional) + settings.momentum_scale * momentum
    return term, settings.momentum_beta * momentum + (1 - settings.momentum_beta) * term


def noise_unit(scheduler: SchedulerMixin, timestep: Tensor) -> float:
    """c in [0, 1]: a difference of predictions, times c, is one of predicted noises, which lambda and s_S are for.

        e = sqrt(a_t) v + sqrt(1 - a_t) x_t    of a model that predicts v, with a_t = alpha_bar_t
        e = x_s + (1 - s) v                    of a flow, x_s = (1 - s) x + s e and v = e - x

    Args:
        timestep: one, or [B] equal ones, as the sampler passes them; of a flow s times the number of all. Between two
            of those that training knows the nearer one's a_t counts.

    Raises:
        ValueError: the scheduler's model predicts something else.
    """
    predicts = scheduler.config.get("prediction_type")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return 1 - float(timestep.flatten()[0]) / scheduler.config.num_train_timesteps
    if predicts == "epsilon":
        return 1.0
    if predicts != "v_prediction":
        raise ValueError(
            "safety guidance needs a model that predicts epsilon, v_prediction or a flow's velocity, got a "
            f"{type(scheduler).__name__} with prediction_type {predicts!r}"
        )
    return float(scheduler.alphas_cumprod[round(float(timestep.flatten()[0]))]) ** 0.5


def _with_concept(told: Mapping[str, Any], concept: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model is told of [negative prompts, prompts], and of the concept as of the prompts but for its text."""
    extended = {}
    for name, value in told.items():
        if isinstance(value, Mapping):
            value = _with_concept(value, concept)
        elif isinstance(value, Tensor) and value.ndim:
            prompts = value.chunk(2)[1]
            value = torch.cat([value, concept[name].to(value).expand_as(prompts) if name in concept else prompts])
        extended[name] = value
    return extended


class SafelyGuided(nn.Module):
    """Stands in for a model in one run of a sampler that guides: the sampler's own guidance then gives that of SLD.

    Called for [negative prompts, prompts], as by a stock sampler, it evaluates the safety concept besides and returns
    e_u and e_p - g: guidance makes e_u + s_g (e_p - e_u - g) of them (Eq. 3). Of a model that predicts something else
    than the noise e_u and e_p are its own predictions, and g is 1 / c of that of the noises (`noise_unit`), so that it
    draws as one that predicts the noise would. Where c is 0 no prediction changes the noise, and nothing is led away.
    It holds the momentum, of the noises, and counts the steps, so every run takes a new one.

    Args:
        model: left as it is, compiled or not.
        concept: what it is told of the safety concept's text, a row each, by the names of its arguments at any depth.
        unit: c at a timestep, which may be one a row.
    """

    def __init__(
        self,
        model: nn.Module,
        concept: Mapping[str, Tensor],
        settings: SafetySettings,
        unit: Callable[[Tensor], float],
    ):
        super().__init__()
        self.model, self.concept, self.settings, self.unit = model, concept, settings, unit
        self.step, self.momentum = 0, None

    # What samplers ask of a model, wherever it is by then.
    config, device, dtype, add_embedding = (
        property(attrgetter(f"model.{name}")) for name in ("config", "device", "dtype", "add_embedding")
    )

    def forward(self, *placed: Tensor, **told: Any) -> tuple[Tensor]:
        """Latents [2 B, C, h, w], a timestep and conditions of 2 B rows, a UNet's first two also without their names;
        a tuple, one prediction [2 B, C, h, w]."""
        told |= dict(zip(("sample", "timestep"), placed, strict=False)) | {"return_dict": False}
        unconditional, conditional, unsafe = self.model(**_with_concept(told, self.concept))[0].chunk(3)
        if self.momentum is None:
            self.momentum = torch.zeros_like(conditional)
        unit = self.unit(told["timestep"])
        noises = (unit * predicted for predicted in (unconditional, conditional, unsafe))  # but for x_t's share
        term, self.momentum = safety_term(*noises, self.momentum, self.settings)
        acts = unit > 0 and self.step >= self.settings.warmup_steps
        self.step += 1
        return (torch.cat([unconditional, conditional - term / unit if acts else conditional]),)


class SafeGuidance:
    """What leads a pipeline of diffusers away from a concept while it draws: its first base, before the stock class.

    A step costs three evaluations of the model in place of two. The stock class loads what the pipeline saves, and
    draws without the guidance.
    """

    guided_part: ClassVar[str] = "unet"
    reads: ClassVar[tuple[str, ...]]  # the names of its arguments for a text: of its tokens, and of the pooled one
    encodes_with: ClassVar[tuple[str, ...]] = ()  # what `encode_prompt` must be given besides a text: None

    def _lead_away(self, safety_concept: str, safety_level: str) -> None:
        """Take a concept and a level into the configuration. Raises ValueError: another level, an empty concept."""
        if safety_level not in SAFETY_LEVELS:
            raise ValueError(f"expected safety_level to be one of {', '.join(SAFETY_LEVELS)}, got {safety_level!r}")
        if not safety_concept.strip():
            raise ValueError("expected a safety_concept to lead away from, got an empty text")
        self.register_to_config(safety_concept=safety_concept, safety_level=safety_level)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        safety: SafetySettings | None = None,
        safety_concept_embeds: Tensor | None = None,
        safety_concept_pooled_embeds: Tensor | None = None,
        **options: Any,
    ) -> BaseOutput | tuple:
        """Draw images as the stock pipeline does, whose other options it takes by name.

        Args:
            guidance_scale: above 1, since safety guidance is a part of guidance; None: the stock pipeline's.
            num_inference_steps: more than the warm-up, which is not shortened for fewer steps: `for_steps` does that.
                None: the stock pipeline's.
            safety: other settings than those of the pipeline's level.
            safety_concept_embeds: [1, L, D], in place of the embedding of the pipeline's concept; needed where the
                pipeline has no text encoder.
            safety_concept_pooled_embeds: [1, P], beside it, of models that also read a pooled text.

        Raises:
            ValueError: options under which safety guidance would do nothing, or is not defined.
        """
        usual, model = inspect.signature(super().__call__).parameters, getattr(self, self.guided_part)
        if num_inference_steps is None:
            num_inference_steps = usual["num_inference_steps"].default
        if guidance_scale is None:
            guidance_scale = usual["guidance_scale"].default
        if guidance_scale <= 1 or model.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "safety guidance is a part of classifier-free guidance: expected guidance_scale > 1 and a model that "
                f"is not distilled for guidance, got {guidance_scale} and {type(model).__name__} with "
                f"time_cond_proj_dim {model.config.get('time_cond_proj_dim')}"
            )
        settings = safety or SAFETY_LEVELS[self.config.safety_level]
        if settings.warmup_steps >= num_inference_steps:
            raise ValueError(
                f"safety guidance begins after {settings.warmup_steps} steps of warm-up: expected more "
                f"num_inference_steps, got {num_inference_steps}; or pass safety=settings.for_steps(...)"
            )
        for name in ("guidance_rescale", "ip_adapter_image", "ip_adapter_image_embeds", "skip_guidance_layers"):
            value = options.get(name)
            if value is not None and not (name == "guidance_rescale" and value == 0):
                raise ValueError(f"{name}: safety guidance is not defined with it; omit it")
        embedded = [one for one in (safety_concept_embeds, safety_concept_pooled_embeds) if one is not None]
        concept = self._concept(embedded, options)
        setattr(self, self.guided_part, SafelyGuided(model, concept, settings, partial(noise_unit, self.scheduler)))
        try:
            return super().__call__(
                prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **options
            )
        finally:
            setattr(self, self.guided_part, model)

    def _concept(self, embedded: Sequence[Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The concept by the names of `reads`, [1, L, D] and [1, P]: as given, or else encoded here, in as many tokens
        as these options give a prompt."""
        if embedded and len(embedded) != len(self.reads):
            raise ValueError(
                f"expected safety_concept_embeds {'and' if len(self.reads) > 1 else 'without'} "
                "safety_concept_pooled_embeds, as this model reads a text"
            )
        if not embedded:
            own = dict.fromkeys(self.encodes_with) | {n: options[n] for n in ("max_sequence_length",) if n in options}
            own |= {"device": self._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            # Beside each stands the one of what guidance leads away from.
            embedded = self.encode_prompt(self.config.safety_concept, **own)[::2]
        return dict(zip(self.reads, embedded, strict=True))
