"""The losses that models are trained by, one value per sample."""

from sa_diffusers.core.losses.autoencoding import CompletionLoss, VAELoss
from sa_diffusers.core.losses.denoising import DenoisingLoss, DiffusionLoss, FlowMatchingLoss
from sa_diffusers.core.losses.embeddings import EmbeddingLoss
from sa_diffusers.core.losses.filling import FillingLoss
from sa_diffusers.core.losses.protocol import GRADIENT_SCALE, Loss, PatchLoss
from sa_diffusers.core.losses.tokens import TokenLoss


__all__ = [
    "GRADIENT_SCALE",
    "CompletionLoss",
    "DenoisingLoss",
    "DiffusionLoss",
    "EmbeddingLoss",
    "FillingLoss",
    "FlowMatchingLoss",
    "Loss",
    "PatchLoss",
    "TokenLoss",
    "VAELoss",
]
