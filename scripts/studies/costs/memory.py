"""Memory of large models on a GPU that is not at hand: bytes, counted on meta tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from sa_diffusers.core.objectives import ewc
from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.families.text_to_image.family import PIXELS_AT_ONCE
from sa_diffusers.training.lora import add_lora
from studies.costs.architectures import build_unet, build_vae
from studies.costs.counting import decoding_bytes, forward_bytes, step_bytes, weight_bytes


FISHER_TIMESTEPS = 20  # of a sample, two draws of 10
SAMPLED_AT_ONCE = 8  # images
LORA_RANK = 16
ADAM_8BIT = 2 * (1 + 4 / 256)  # bytes a weight: two moments, and a float32 scale for every 256 of them


@dataclass(frozen=True)
class Training:
    """How a training step keeps its memory small.

    Attributes:
        rank: of LoRA; None: all weights are trained.
        checkpointing: recompute activations.
        adam_bits: 32 or 8.
        fisher_bytes: a weight; 0: kept in main memory.
        base: precision of the weights under a LoRA.
    """

    name: str
    rank: int | None = None
    checkpointing: bool = False
    adam_bits: int = 32
    fisher_bytes: int = 4
    base: torch.dtype = torch.float32


TRAININGS = (
    Training("full"),
    Training("full, checkpointing", checkpointing=True),
    Training("full, checkpointing, bf16 Fisher", checkpointing=True, fisher_bytes=2),
    Training("full, checkpointing, 8-bit Adam", checkpointing=True, adam_bits=8),
    Training("full, checkpointing, 8-bit Adam, bf16 Fisher", checkpointing=True, adam_bits=8, fisher_bytes=2),
    Training(f"LoRA of rank {LORA_RANK}", rank=LORA_RANK),
    Training(f"LoRA of rank {LORA_RANK}, checkpointing", rank=LORA_RANK, checkpointing=True),
)


def estimate_memory(
    trainings: Sequence[Training] = TRAININGS,
    batch_size: int = 8,
    build: Callable[[], nn.Module] = build_unet,
    size: int = 64,
    targets: str = "attention",
) -> list[dict[str, Any]]:
    """One row a way of training in bf16: gigabytes (10^9) of each part, and the most at any moment.

    A process holds about a gigabyte more (CUDA's context, and what the allocator cannot use). The replay's targets
    come from a copy of the UNet as it was, whose weights are also EWC's anchor; for LoRA, from the UNet without its
    adapters. Text encoder and VAE are in main memory meanwhile.

    Args:
        batch_size: surrogate and replay samples together.
        build: makes the trained part.
        size: height and width of the latents.
        targets: layers that a LoRA adapts, as of `lora_targets`.
    """
    return [_memory(training, batch_size, on_meta(build), size, targets) for training in trainings]


def _memory(training: Training, batch_size: int, denoiser: nn.Module, size: int, targets: str) -> dict[str, Any]:
    nn.Module.to(denoiser, training.base)
    whole = weight_bytes(denoiser)
    held_by_fisher = whole // training.base.itemsize
    if training.rank:
        layers = adapted_layers(denoiser, "full", targets)
        held_by_fisher = sum(denoiser.get_submodule(name).weight.numel() for name in layers)
        add_lora(denoiser, layers, training.rank, training.rank, seed=0)
    trained = weight_bytes(denoiser, trained_only=True)
    parts = {
        "weights": weight_bytes(denoiser),
        "Adam": trained * 2 if training.adam_bits == 32 else trained / 4 * ADAM_8BIT,
        "frozen copy or anchor": 0 if training.rank else whole,
        "Fisher": held_by_fisher * training.fisher_bytes,
    }
    passes = step_bytes(denoiser, batch_size, torch.bfloat16, training.checkpointing, size)
    # AdamW's square roots are a copy of the weights, which 8-bit Adam does without.
    sizes = [p.numel() for p in denoiser.parameters() if p.requires_grad]
    temporary = max(trained if training.adam_bits == 32 else 0, ewc_temporary(sizes, training.fisher_bytes != 4))
    peak = sum(parts.values()) + max(passes, trained + temporary)
    row = {"training": training.name, **parts, "gradients": trained, "activations": passes - trained}
    row |= {"update's temporaries": temporary, "peak": peak}
    return {key: value if isinstance(value, str) else value / 1e9 for key, value in row.items()}


def estimate_stage_memory() -> list[dict[str, Any]]:
    """One row a stage beside training, in gigabytes: drawing guided images, decoding them, the Fisher of a sample."""
    denoiser = on_meta(build_unet)
    whole = weight_bytes(denoiser)
    vae = on_meta(build_vae)
    at_once = PIXELS_AT_ONCE // 512**2
    drawing = forward_bytes(denoiser, 2 * SAMPLED_AT_ONCE, torch.bfloat16)
    rows = [
        (f"sampling, {SAMPLED_AT_ONCE} latents", whole, 0, drawing),
        (f"decoding, {at_once} at once", whole + weight_bytes(vae), 0, decoding_bytes(vae, at_once)),
    ]
    denoiser.requires_grad_(True)
    for checkpointing, on_device in product((False, True), repeat=2):
        passes = step_bytes(denoiser, FISHER_TIMESTEPS // 2, torch.bfloat16, checkpointing)
        # The first draw's gradient waits where the sums are while the second is made, in one pass.
        sums = whole * on_device
        name = f"Fisher{', checkpointing' * checkpointing}{', sums on the GPU' * on_device}"
        rows.append((name, whole, sums, sums + passes))
    names = ("weights", "sums", "draws and passes", "peak")
    return [
        {"stage": stage} | {name: count / 1e9 for name, count in zip(names, (*counts, sum(counts)), strict=True)}
        for stage, *counts in rows
    ]


def ewc_temporary(sizes: Sequence[int], cast_fisher: bool) -> int:
    """At most so many bytes are taken while EWC's gradient is added, in float32 and group by group.

    A group needs its pull, and its Fisher where that is kept in another precision.

    Args:
        sizes: weights of each trained tensor.
    """
    return 4 * (1 + cast_fisher) * min(sum(sizes), ewc.GROUP_SIZE + max(sizes))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with shapes and no values."""
    with torch.device("meta"):
        return build()
