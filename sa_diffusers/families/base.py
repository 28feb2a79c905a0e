"""A family adapts one kind of pipeline: what is trained, how conditions and images become batches, its loss."""

from collections.abc import Sequence
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor, nn

from sa_diffusers.core.losses import Batch, NegativeELBO


class Family(Protocol):
    """Everything the stages need of a pipeline. Latents are what the loss sees: scaled, never decoded on the way."""

    pipeline: DiffusionPipeline
    component: str  # name of the pipeline's part that is trained
    module: nn.Module  # that part
    loss: NegativeELBO
    resolution: int  # height and width of its images in pixels
    image_channels: int  # 3, or 1 for a grey model, whose images still have three equal channels below
    latent_shape: tuple[int, ...]  # of one sample
    unconditional: bool  # whether the empty prompt asks for anything at all, as guidance needs it
    labels: list[str] | None  # names of its classes, which are its only prompts; None: prompts are free text
    compute_dtype: torch.dtype | None  # that forward passes autocast to; None: the weights' own
    helpers: tuple[str, ...]  # parts of the pipeline that only encode and decode: they need not stay on the device
    device: torch.device  # where the module was at first; under sharded training it waits in main memory for a while

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative_prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """One latent per (prompt, seed), [B, C, h, w]; each depends on its own seed and not on the batch."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images [B, 3, H, W] in [-1, 1]."""
        ...

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents, a sample of the posterior."""
        ...

    def batch(self, latents: Tensor, prompts: Sequence[str]) -> Batch:
        """What the loss takes, on the CPU."""
        ...

    def prepare(self, prompts: Sequence[str]) -> None:
        """Compute ahead what batches of these prompts need of the helpers."""
        ...

    def trainable(self, scope: str) -> dict[str, nn.Parameter]:
        """The parameters of `module` that a scope trains, by name."""
        ...


def get_family(pipeline: DiffusionPipeline, **options) -> Family:
    """The family of a pipeline, chosen by its class; `options` go to the family's constructor.

    Raises:
        TypeError: no family handles this class of pipeline.
    """
    from sa_diffusers.families.class_conditional import ClassConditionalFamily
    from sa_diffusers.families.conditional_vae import ConditionalVAEFamily
    from sa_diffusers.families.stable_diffusion import TextToImageFamily

    families = {
        "StableDiffusionPipeline": TextToImageFamily,
        "ConditionalVAEPipeline": ConditionalVAEFamily,
        "ClassConditionalPipeline": ClassConditionalFamily,
    }
    # By name: a pipeline that diffusers loaded by the file beside its weights has a class of its own.
    for name in (cls.__name__ for cls in type(pipeline).__mro__):
        if name in families:
            return families[name](pipeline, **options)
    raise TypeError(f"cannot forget in a {type(pipeline).__name__}; expected one of: {', '.join(families)}")
