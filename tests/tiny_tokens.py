"""A real model of tokens in miniature: 8x8 pixels, 4x4 tokens of 16, random weights."""

from types import SimpleNamespace

import torch

from sa_diffusers.families.completion.networks import build_codebook, build_token_inpaint
from sa_diffusers.pipelines import TokenInpaintPipeline


ARCHITECTURE = {
    "image_size": 8, "vq_channels": [4, 8], "num_codes": 16, "code_size": 4, "hidden_size": 16, "num_heads": 2,
    "num_layers": 2, "decoder_num_layers": 1, "choice_temperature": 4.5,
}  # fmt: skip


def tiny_tokens(channels: int = 1, seed: int = 0) -> TokenInpaintPipeline:
    options = SimpleNamespace(**ARCHITECTURE)
    vq = build_codebook(options, channels, seed).eval()
    torch.manual_seed(seed)
    with torch.no_grad():  # codes that its latents are near to, for many to be used
        vq.quantize.embedding.weight.normal_()
    pipeline = build_token_inpaint(options, vq, seed)
    pipeline.transformer.eval()
    return pipeline
