"""A real masked autoencoder in miniature: 8x8 pixels, 4x4 patches of 2, random weights."""

from types import SimpleNamespace

from sa_diffusers.families.architectures import build_masked_autoencoder
from sa_diffusers.pipelines import MaskedAutoencoderInpaintPipeline


def tiny_mae(channels: int = 1, seed: int = 0) -> MaskedAutoencoderInpaintPipeline:
    options = SimpleNamespace(
        image_size=8, patch_size=2, hidden_size=16, num_layers=2, num_heads=2, decoder_hidden_size=8,
        decoder_num_layers=1, initializer_range=0.2,
    )  # fmt: skip
    pipeline = build_masked_autoencoder(options, channels, seed)
    pipeline.mae.eval()
    return pipeline
