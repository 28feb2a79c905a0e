"""Stable Diffusion 1.4 in its real size, with random weights: nothing is fetched, and meta tensors will do."""

from collections.abc import Callable
from functools import partial

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.models import tokenizer as text


def build_denoiser(repo: str, name: str) -> nn.Module:
    """A part of a model whose configurations ship, with random weights."""
    part = dict(read_yaml("bundled/single_file/models.yaml")["models"][repo][name])
    return getattr(diffusers, part.pop("_class_name"))(**part)


DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "sdxl": partial(build_denoiser, "stabilityai/stable-diffusion-xl-base-1.0", "unet"),  # 2,567,463,684 weights
    "sd3": partial(build_denoiser, "stabilityai/stable-diffusion-3-medium-diffusers", "transformer"),  # 2,028,328,000
    "flux": partial(build_denoiser, "black-forest-labs/FLUX.1-dev", "transformer"),  # 11,901,408,320
}
# Of each text encoder: CLIP ViT-L, OpenCLIP ViT-bigG, T5 XXL's encoder.
CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
TEXT_ENCODERS = {"sdxl": (CLIP_L, CLIP_G), "sd3": (CLIP_L, CLIP_G, T5_XXL), "flux": (CLIP_L, T5_XXL)}
VOCABULARY = 49408  # of CLIP; it decides the size of the token embeddings, whatever tokenizer is used


def build_unet() -> UNet2DConditionModel:
    """859,520,964 weights. attention_head_dim is the number of heads, a name that diffusers keeps."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def build_vae(latent_channels: int = 4) -> AutoencoderKL:
    """[B, 3, 8h, 8w] to [B, 4, h, w]; 83,653,863 weights, the same for the families above."""
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A small byte-level BPE of 77 tokens a prompt, trained on the replay prompts that ship with the package."""
    prompts = read_prompts("bundled/stable_diffusion/replay_prompts.txt")
    return text.train_tokenizer(prompts, num_merges=500, max_length=77)


def build_text_encoder(tokenizer: CLIPTokenizer | None = None) -> CLIPTextModel:
    """CLIP ViT-L/14's, 123,060,480 weights."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    rest = {"vocab_size": VOCABULARY, "max_position_embeddings": 77, "projection_dim": 768}
    return text.build_text_encoder(sizes | rest, tokenizer)


def build_stable_diffusion(device: torch.device | str = "cpu", seed: int = 0) -> DiffusionPipeline:
    """A whole pipeline with random float32 weights, in eval mode. On "meta" it takes no memory and computes nothing.

    Args:
        device: the weights are drawn there.
        seed: of the weights; the global generator is set to it.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    with torch.device(device):
        denoiser, vae, text_encoder = build_unet(), build_vae(), build_text_encoder(tokenizer)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = vae.eval(), text_encoder.eval(), tokenizer, denoiser.eval(), scheduler
    pipeline = StableDiffusionPipeline(
        *parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
