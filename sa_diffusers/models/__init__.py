"""Models that diffusers does not have."""

from sa_diffusers.models.conditional_vae import ConditionalVAE


__all__ = ["ConditionalVAE"]
