"""Models that complete pictures, made of an architecture, with random weights."""

from typing import Any

import torch
from diffusers import UNet2DModel, VQModel

from sa_diffusers.core.conditions import COARSE
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.families.samplers import pixel_schedule
from sa_diffusers.models import TokenTransformer
from sa_diffusers.pipelines import PixelInpaintPipeline, TokenInpaintPipeline


def build_token_inpaint(options: Any, vq: VQModel, seed: int) -> TokenInpaintPipeline:
    """A pipeline around a codebook, with a transformer of its tokens that is untrained.

    Args:
        options: of `TokenInpaintConfig`, those of its architecture.

    Raises:
        ValueError: heads that do not divide the width.
    """
    if options.hidden_size % options.num_heads:
        raise ValueError(f"expected a hidden_size that {options.num_heads} heads divide, got {options.hidden_size}")
    torch.manual_seed(derive_seed(seed, "transformer"))
    transformer = TokenTransformer(
        num_tokens=vq.config.num_vq_embeddings,
        rows=vq.config.sample_size // 2 ** (len(vq.config.block_out_channels) - 1),
        hidden_size=options.hidden_size,
        num_heads=options.num_heads,
        num_layers=options.num_layers,
        decoder_num_layers=options.decoder_num_layers,
    )
    return TokenInpaintPipeline(vq, transformer, options.choice_temperature)


def build_codebook(options: Any, channels: int, seed: int) -> VQModel:
    """A VQModel, untrained; `options` as of `build_token_inpaint`. Raises ValueError: sizes that do not fit."""
    widths, factor = options.vq_channels, 2 ** (len(options.vq_channels) - 1)
    if options.image_size % factor or options.image_size // factor < 2 or any(w % 4 for w in widths):
        raise ValueError(
            f"expected vq_channels that divide by 4 and halve image_size {options.image_size} to 2 or more, got "
            f"{widths}"
        )
    torch.manual_seed(derive_seed(seed, "vq"))
    return VQModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=options.code_size,
        vq_embed_dim=options.code_size,
        sample_size=options.image_size,
        num_vq_embeddings=options.num_codes,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def build_pixel_inpaint(options: Any, channels: int, seed: int) -> PixelInpaintPipeline:
    """A denoiser of pictures of so many channels that is shown a degraded one, untrained.

    Args:
        options: of `PixelInpaintConfig`, those of its architecture and its schedule.

    Raises:
        ValueError: stages, or squares of 4 pixels, that do not divide the pictures, or groups that no width has.
    """
    widths, size = options.block_out_channels, options.image_size
    factor = max(COARSE, 2 ** (len(widths) - 1))
    if size % factor or any(width % options.norm_num_groups for width in widths):
        raise ValueError(
            f"expected an image_size that {factor} divides and block_out_channels that norm_num_groups "
            f"{options.norm_num_groups} divides, got {size} and {widths}"
        )
    torch.manual_seed(derive_seed(seed, "unet"))
    unet = UNet2DModel(
        sample_size=size,
        in_channels=2 * channels + 1,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=options.layers_per_block,
        norm_num_groups=options.norm_num_groups,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        attention_head_dim=8,
    )
    return PixelInpaintPipeline(unet, pixel_schedule(options))
