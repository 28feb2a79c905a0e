"""Pipelines that diffusers does not have; saved ones are loaded by their own class."""

from sa_diffusers.pipelines.class_conditional import ClassConditionalPipeline
from sa_diffusers.pipelines.conditional_vae import ConditionalVAEPipeline
from sa_diffusers.pipelines.masked_autoencoder import MaskedAutoencoderInpaintPipeline
from sa_diffusers.pipelines.pixels import PixelInpaintPipeline
from sa_diffusers.pipelines.safely_guided import (
    SafeGuidancePipeline,
    SafeGuidanceSD3Pipeline,
    SafeGuidanceXLPipeline,
)
from sa_diffusers.pipelines.tokens import TokenInpaintPipeline


__all__ = [
    "ClassConditionalPipeline",
    "ConditionalVAEPipeline",
    "MaskedAutoencoderInpaintPipeline",
    "PixelInpaintPipeline",
    "SafeGuidancePipeline",
    "SafeGuidanceSD3Pipeline",
    "SafeGuidanceXLPipeline",
    "TokenInpaintPipeline",
]
