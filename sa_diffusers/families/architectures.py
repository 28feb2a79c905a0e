"""Pipelines made of an architecture, with random weights: nothing is fetched, and meta tensors will do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.io.bundled import resolve
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.models import tokenizer as text
from sa_diffusers.pipelines import ClassConditionalPipeline, ConditionalVAEPipeline


Version = Literal["sd14", "sd21"]

VOCABULARY = 49408  # of CLIP; it decides the size of the token embeddings, whatever tokenizer is used

# What differs from diffusers' defaults, which are the rest of Stable Diffusion 1. attention_head_dim is the number of
# heads: diffusers keeps this name for a historical reason.
UNETS = {
    "sd14": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}
TEXT_ENCODERS = {
    "sd14": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
PREDICTION_TYPES = {"sd14": "epsilon", "sd21": "v_prediction"}


def build_unet(version: Version = "sd14") -> UNet2DConditionModel:
    """859,520,964 weights for sd14, 865,910,724 for sd21."""
    return UNet2DConditionModel(**UNETS[version])


def build_vae() -> AutoencoderKL:
    """The autoencoder of both: [B, 3, 8h, 8w] to [B, 4, h, w]; 83,653,863 weights."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A small byte-level BPE of 77 tokens a prompt, trained on the replay prompts that ship with the package."""
    lines = Path(resolve("bundled/stable_diffusion/replay_prompts.txt")).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return text.train_tokenizer(prompts, num_merges=500, max_length=77)


def build_text_encoder(version: Version = "sd14", tokenizer: CLIPTokenizer | None = None) -> CLIPTextModel:
    """CLIP ViT-L/14's for sd14, 123,060,480 weights; the first 23 layers of OpenCLIP ViT-H/14's for sd21."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 77, "projection_dim": 768}
    return text.build_text_encoder(sizes | TEXT_ENCODERS[version], tokenizer)


def build_stable_diffusion(
    version: Version = "sd14", device: torch.device | str = "cpu", seed: int = 0
) -> StableDiffusionPipeline:
    """A whole pipeline with random float32 weights, in eval mode. On "meta" it takes no memory and computes nothing.

    Args:
        device: the weights are drawn there.
        seed: of the weights; the global generator is set to it.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    with torch.device(device):
        unet, vae, text_encoder = build_unet(version), build_vae(), build_text_encoder(version, tokenizer)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTION_TYPES[version],
    )
    pipeline = _stable_diffusion(unet.eval(), vae.eval(), text_encoder.eval(), tokenizer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_text_to_image(
    architecture: Mapping[str, dict[str, Any]],
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    seed: int,
) -> StableDiffusionPipeline:
    """A small Stable Diffusion around trained parts.

    Args:
        architecture: the configurations of the parts that are new, "unet" and "scheduler" (DDIM).
        seed: of the UNet's weights; the global generator is set from it.
    """
    torch.manual_seed(derive_seed(seed, "unet"))
    unet, scheduler = UNet2DConditionModel(**architecture["unet"]), DDIMScheduler(**architecture["scheduler"])
    return _stable_diffusion(unet, vae, text_encoder, tokenizer, scheduler)


def _stable_diffusion(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: SchedulerMixin,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_unet(options: Any, image_size: int, channels: int, num_classes: int) -> UNet2DModel:
    """A UNet conditioned by FiLM on the sum of the embeddings of timestep and class; the last class is the null class.

    Args:
        options: of `ClassConditionalConfig`, those of its architecture.

    Raises:
        ValueError: images that cannot be halved that often, or attention at a resolution that no stage has.
    """
    count = len(options.block_out_channels)
    resolutions = [image_size // 2**stage for stage in range(count)]
    if image_size % 2 ** (count - 1):
        raise ValueError(f"images of {image_size} pixels cannot be halved {count - 1} times; pass fewer stages")
    absent = [size for size in options.attention_resolutions if size not in resolutions]
    if absent:
        raise ValueError(f"expected attention_resolutions among {resolutions}, got {absent[0]}")
    attends = [size in options.attention_resolutions for size in resolutions]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=options.layers_per_block,
        block_out_channels=tuple(options.block_out_channels),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=options.attention_head_dim,
        norm_num_groups=options.norm_num_groups,
        norm_eps=1e-6,
        dropout=options.dropout,
        num_class_embeds=num_classes + 1,
        resnet_time_scale_shift="scale_shift",
    )


def build_class_conditional(
    options: Any, image_size: int, channels: int, names: Sequence[str], seed: int
) -> ClassConditionalPipeline:
    """Class-conditional diffusion on pixels, untrained; its noise schedule goes from beta 1e-4 to 0.02.

    Args:
        options: of `ClassConditionalConfig`, those of its architecture and its noise schedule.
        names: of the classes.
        seed: of the weights; the global generator is set from it.

    Raises:
        ValueError: as `make_unet`.
    """
    torch.manual_seed(derive_seed(seed, "unet"))
    unet = make_unet(options, image_size, channels, len(names))
    schedule = DDPMScheduler(
        num_train_timesteps=options.num_train_timesteps,  # by name: diffusers forgets what is given by position
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=options.beta_schedule,
        prediction_type=options.prediction_type,
        clip_sample=False,
    )
    return ClassConditionalPipeline(unet, schedule, _id2label(names))


def build_conditional_vae(
    hidden_sizes: Sequence[int], latent_dim: int, image_size: int, channels: int, names: Sequence[str], seed: int
) -> ConditionalVAEPipeline:
    """A conditional VAE, untrained.

    Args:
        hidden_sizes: widths of the encoder's hidden layers, those of the decoder in reverse.
        latent_dim: dimension of z.
        names: of the classes.
        seed: of the weights; the global generator is set from it.
    """
    torch.manual_seed(derive_seed(seed, "vae"))
    vae = ConditionalVAE(image_size, channels, len(names), tuple(hidden_sizes), latent_dim)
    return ConditionalVAEPipeline(vae, _id2label(names))


def _id2label(names: Sequence[str]) -> dict[str, str]:
    """The names of the classes as pipelines store them."""
    return {str(index): name for index, name in enumerate(names)}
