"""What forgetting in models that complete pictures costs at the paper's sizes and settings: counted, not run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from sa_diffusers.cli.parse import parse_config
from sa_diffusers.families import family_class
from sa_diffusers.models import TokenTransformer
from sa_diffusers.models.memory import TensorBytes
from sa_diffusers.runs.options import ForgetConfig
from studies.costs.counting import CudaKernels, inputs_of, weight_bytes
from studies.costs.estimate import BACKWARD, PEAK, SHARES
from studies.costs.memory import on_meta
from studies.rows import duration, table_of


CONFIGS = Path(__file__).parents[3] / "configs" / "paper"
SIDE = 256  # pixels of a picture; Stable Diffusion's latents are those of 512


def _palette() -> UNet2DModel:
    """As `build_pixel_inpaint` makes of the paper's widths; Palette itself also attends at 16 pixels."""
    widths = (64, 128, 256, 512)
    return UNet2DModel(
        sample_size=SIDE, in_channels=7, out_channels=3, block_out_channels=widths, layers_per_block=2,
        down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4, attention_head_dim=8,
    )  # fmt: skip


def _sd_inpaint() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, in_channels=9, cross_attention_dim=768, attention_head_dim=8)


def _sd_encoder() -> AutoencoderKL:
    down, up = (("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4)
    widths = (128, 256, 512, 512)
    return AutoencoderKL(block_out_channels=widths, layers_per_block=2, down_block_types=down, up_block_types=up)


def _vq_gan() -> VQModel:
    return VQModel(
        block_out_channels=(128, 128, 256, 256, 512), layers_per_block=2, num_vq_embeddings=1024, latent_channels=256,
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5, sample_size=SIDE,
    )  # fmt: skip


# file of configs/paper: what encodes pictures for it, their pixels, and how often for a forward pass
ENCODED: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "i2i_tokens": (_vq_gan, SIDE, 1),
    "i2i_sd": (_sd_encoder, 512, 2),  # the picture, and what is shown of it
}
# file of configs/paper: what makes the trained part, and the pipeline that it is of
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "i2i_mae": (lambda: ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=0.25)), "MaskedAutoencoderInpaintPipeline"),
    "i2i_tokens": (lambda: TokenTransformer(1024, 16, 768, 12, 12, 8), "TokenInpaintPipeline"),
    "i2i_pixels": (_palette, "PixelInpaintPipeline"),
    "i2i_sd": (_sd_inpaint, "StableDiffusionInpaintPipeline"),
}


def estimate_completion() -> tuple[list[dict[str, Any]], str]:
    """One row a model: weights, those of its encoder, and the memory and time of a whole run; as Markdown too."""
    rows = [_row(name) for name in MODELS]
    text = (
        "Forgetting in the encoder at real size: counted on meta tensors, not measured. Memory is of one picture to "
        "forget and one to retain in bf16 autocast: weights, the frozen copy, Adam and gradients of the encoder, "
        f"activations. Time is of the steps of `configs/paper/<model>.yaml` on one H200 at {SHARES[1]:.0%} of its "
        f"peak, without reading pictures and judging.\n\n{table_of(rows)}"
    )
    return rows, text


def _row(name: str) -> dict[str, Any]:
    build, pipeline = MODELS[name]
    config = parse_config(ForgetConfig, ["--config", str(CONFIGS / f"{name}.yaml")])
    module = on_meta(build)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _call(module, 1)
    flops = counter.get_total_flops()
    family = family_class(pipeline)
    for weight, parameter in module.named_parameters():
        parameter.requires_grad_(family.scopes["encoder"](weight))
    whole, trained = weight_bytes(module), weight_bytes(module, trained_only=True)
    with TensorBytes() as held, CudaKernels(torch.bfloat16):
        _call(module, 2)
    pictures = 2 * config.num_train_steps * config.train_batch_size
    work = pictures * ((2 + BACKWARD) * flops + 2 * _encoding(name))  # for the model, and for the frozen copy
    return {
        "model": name,
        "weights": f"{whole // 4:,}",
        "encoder": f"{trained / whole:.0%}",
        "GFLOPs of a pass": round(flops / 1e9, 1),
        "GB": (2 * whole + 3 * trained + held.peak) / 1e9,
        "steps x pictures": f"{config.num_train_steps:,} x 2 x {config.train_batch_size}",
        "time": duration(work / (SHARES[1] * PEAK)),
    }


def _encoding(name: str) -> int:
    """Operations by which a picture is encoded for a forward pass."""
    if name not in ENCODED:
        return 0
    build, side, times = ENCODED[name]
    module = on_meta(build)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.encode(torch.empty(1, 3, side, side, device="meta"))
    return times * counter.get_total_flops()


def _call(module: nn.Module, count: int) -> Tensor:
    """Pass so many pictures through the module."""
    if isinstance(module, UNet2DConditionModel):
        return module(**inputs_of(module, count, module.config.sample_size)).sample
    with torch.device("meta"):
        if isinstance(module, UNet2DModel):
            pictures = torch.empty(count, module.config.in_channels, SIDE, SIDE)
            return module(pictures, torch.zeros(count, dtype=torch.long)).sample
        if isinstance(module, TokenTransformer):
            tokens = torch.zeros(count, module.config.rows**2, dtype=torch.long)
            return module(tokens, tokens > 0).logits
        size, places = module.config.image_size, (module.config.image_size // module.config.patch_size) ** 2
        return module(torch.empty(count, 3, size, size), noise=torch.empty(count, places)).logits
