"""Models that diffusers does not have."""

from sa_diffusers.models.conditional_vae import ConditionalVAE
from sa_diffusers.models.token_transformer import TokenTransformer


__all__ = ["ConditionalVAE", "TokenTransformer"]
