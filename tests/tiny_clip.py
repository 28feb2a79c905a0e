"""A CLIP in miniature, of random weights, saved as on the hub."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


def save_tiny_clip(folder: Path, tokenizer: CLIPTokenizer, seed: int = 0) -> Path:
    """16 pixels in 4 patches, 12 tokens, embeddings of 6 numbers; it tells images and texts apart."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 12},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=6,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():  # as it is made, all texts would be embedded almost alike
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder
