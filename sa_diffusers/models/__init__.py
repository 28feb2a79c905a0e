"""Models that diffusers does not have."""

from .conditional_vae import ConditionalVAE


__all__ = ["ConditionalVAE"]
