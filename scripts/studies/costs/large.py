"""What a LoRA costs on Stable Diffusion XL, 3 (medium) and FLUX.1 (dev) at 1024 pixels: counted, not run."""

from typing import Any

import torch
from torch import nn

from sa_diffusers.families.scopes import adapted_layers
from studies.costs.architectures import DENOISERS, TEXT_ENCODERS, build_vae
from studies.costs.counting import (
    decoding_bytes,
    decoding_flops,
    forward_bytes,
    forward_flops,
    step_bytes,
    weight_bytes,
)
from studies.costs.estimate import PEAK, SHARES, Job, estimate_costs, extrapolate
from studies.costs.memory import LORA_RANK, Training, estimate_memory, on_meta
from studies.rows import table_of


LATENTS, TARGETS = 128, "attention+conditioning"
GUIDED = {"sdxl": 2, "sd3": 2, "flux": 1}  # passes of a sampler's step
LIMITS = {"sdxl": 16, "sd3": 24, "flux": 40}  # gigabytes of a card that shall do
JOB = Job("500 + 100 samples, 28 steps each, 4,000 Fisher gradients, 500 steps of 1 + 1", 600, 28, 4_000, 500, 2, 200)
TRAININGS = (
    Training("weights in float32", rank=LORA_RANK, checkpointing=True),
    Training("weights in bf16", rank=LORA_RANK, checkpointing=True, base=torch.bfloat16),
)


def estimate_large(size: str) -> tuple[dict[str, Any], str]:
    """Memory by stage and times of one of DENOISERS, for JSON, and as Markdown."""
    build, limit = DENOISERS[size], LIMITS[size]
    rows = estimate_memory(TRAININGS, 2, build, LATENTS, TARGETS)
    for row in rows:
        row["peak, Fisher in main memory"] = row["peak"] - row["Fisher"]
    stages, times = _stages(size), _times(size)
    needed = max(rows[-1]["peak, Fisher in main memory"], *(row["peak"] for row in stages))
    report = {"size": size, "limit": limit, "needed": needed, "memory": rows, "stages": stages, "times": times}
    report["needed in 4 bits"] = needed - _spared(on_meta(build)) / 1e9
    text = (
        f"A LoRA of rank {LORA_RANK} on {TARGETS} at 1024 pixels, steps of 1 + 1 samples, with gradient checkpointing "
        f"and bf16 autocast, in GB (10^9 bytes): counted on meta tensors, not measured. The run needs {needed:.1f} of "
        f"{limit}, with the weights in bf16 and EWC's Fisher in main memory; with linear layers in 4 bits "
        f"{report['needed in 4 bits']:.1f}.\n\n{table_of(rows)}\nOther stages, "
        "weights in bf16; the Fisher is of the adapted layers alone, a noise level at a time.\n\n"
        f"{table_of(stages)}\nSeconds on an H200 for {JOB.name}.\n\n{table_of(times)}"
    )
    return report, text


def _spared(denoiser: nn.Module) -> float:
    """Bytes that 4 bits a weight of the linear layers, and a float32 for every 64, spare beside bf16.

    One of the layers at a time is in bf16, to be computed with.
    """
    counts = [layer.weight.numel() for layer in denoiser.modules() if type(layer) is nn.Linear]
    return sum(counts) * (2 - 4 / 8 - 4 / 64) - 2 * max(counts)


def _stages(size: str) -> list[dict[str, Any]]:
    denoiser = nn.Module.to(on_meta(DENOISERS[size]), torch.bfloat16)
    vae = nn.Module.to(on_meta(lambda: build_vae(4 if size == "sdxl" else 16)), torch.bfloat16)
    whole, texts = weight_bytes(denoiser), 2 * sum(TEXT_ENCODERS[size])
    drawing = forward_bytes(denoiser, GUIDED[size], torch.bfloat16, LATENTS)
    decoding = weight_bytes(vae) + decoding_bytes(vae, 1, LATENTS)
    for name in adapted_layers(denoiser, "full", TARGETS):
        denoiser.get_submodule(name).weight.requires_grad_(True)
    fisher = step_bytes(denoiser, 1, torch.bfloat16, True, LATENTS)
    found = {"encoding prompts": texts, "sampling, a picture": drawing, "decoding, a picture": decoding}
    found |= {"Fisher, sums in main memory": fisher}
    sizes = {name: (whole / 1e9, besides / 1e9) for name, besides in found.items()}
    return [{"stage": name, "weights": w, "besides": b, "peak": w + b} for name, (w, b) in sizes.items()]


def _times(size: str) -> list[dict[str, Any]]:
    denoiser: nn.Module = on_meta(DENOISERS[size])
    forward = forward_flops(denoiser, LATENTS)
    decoding = decoding_flops(on_meta(lambda: build_vae(4 if size == "sdxl" else 16)), LATENTS)
    rows = []
    for share in SHARES:
        costs = estimate_costs(share * PEAK, (forward, decoding), weight_bytes(denoiser))
        seconds = extrapolate(JOB, costs)
        rows.append({"share of peak": f"{share:.0%}"} | {name: round(value) for name, value in seconds.items()})
    return rows
