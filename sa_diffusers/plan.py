"""What a run is about to do and what it will cost, from one timed forward pass; what cannot fit is refused."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sa_diffusers.config import ForgetConfig
from sa_diffusers.families import Family


BACKWARD = 2.0  # a backward pass costs about two forward passes
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it does in a few words, estimated seconds, and whether it is reused."""

    name: str
    what: str
    seconds: float
    reused: bool = False


class NotEnoughMemory(RuntimeError):
    """The weights, gradients and optimiser state alone exceed the memory."""


def seconds_per_sample(family: Family, batch_size: int) -> float:
    """Seconds of one UNet forward pass per sample, timed on zeros after one pass that warms up."""
    latents = torch.zeros(batch_size, *family.latent_shape)
    prompt = family.labels[0] if family.labels else ""
    batch = {k: v.to(family.pipeline.device) for k, v in family.batch(latents, [prompt] * batch_size).items()}
    terms = torch.zeros(batch_size, dtype=torch.long, device=family.pipeline.device)
    noise = family.loss.sample_noise(batch, torch.Generator())
    elapsed = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            float(family.loss(family.module, batch, terms, noise).sum())  # float() waits for the device
        elapsed = time.perf_counter() - start
    return elapsed / batch_size


def estimate(config: ForgetConfig, per_sample: float, num_evaluated: int, num_terms: int) -> dict[str, float]:
    """Seconds of each stage, from forward passes; without decoding and loading: real runs take a little longer."""

    def drawing(count: int, guidance: float) -> float:
        return count * config.num_inference_steps * (2 if guidance > 1 else 1) * per_sample

    terms = num_terms if config.terms is None else 2 * config.terms
    return {
        "sample": drawing(
            round(config.num_samples * (1 + config.empty_prompt_fraction)), config.replay_guidance_scale
        ),
        "surrogate": 0.0
        if config.surrogate == "noise"
        else drawing(config.num_surrogate_samples, config.guidance_scale),
        "fisher": config.fisher_samples * terms * (1 + BACKWARD) * per_sample if config.ewc_lambda else 0.0,
        "train": config.num_train_steps * 2 * config.train_batch_size * (1 + BACKWARD) * per_sample,
        "evaluate": drawing(2 * num_evaluated, config.guidance_scale),
    }


def trained_bytes(family: Family, config: ForgetConfig) -> int:
    """Memory that training takes beside the pipeline: gradients, Adam moments, anchor, Fisher, average, frozen."""
    count = sum(p.numel() for p in family.trainable(config.train_scope).values())
    copies = 1 + 2 + (2 if config.ewc_lambda else 0) + (1 if config.ema_decay is not None else 0)
    frozen = config.replay_target == "model" and config.replay_weight
    whole = sum(p.numel() for p in family.module.parameters()) if frozen else 0
    return FLOAT32 * (copies * count + whole)


def disk_bytes(family: Family, config: ForgetConfig) -> int:
    """Room for pipeline, Fisher, samples and checkpoints (one more than kept, while the newest is written)."""
    modules = [m for m in family.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    pipeline = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    unet = FLOAT32 * sum(p.numel() for p in family.module.parameters())
    kept = config.checkpoints_total_limit + 1 if config.checkpointing_steps else 0
    latents = (config.num_samples * 2 + config.num_surrogate_samples) * math.prod(family.latent_shape) * FLOAT32
    return int(pipeline + (unet if config.ewc_lambda else 0) + kept * 4 * unet + latents)


def check_memory(needed: int, device: torch.device) -> int:
    """Free bytes on the device; raises NotEnoughMemory if `needed` exceeds them."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise NotEnoughMemory(
            f"training needs {needed / 1e9:.1f} GB beside the model, {device} has {free / 1e9:.1f} GB free: use "
            "--train_scope xattn, a larger device, or ewc_lambda 0"
        )
    return free


def describe(stages: list[StagePlan], memory: int, disk: int, output_dir: Path) -> str:
    """The plan as a table for the terminal."""
    free = shutil.disk_usage(next(p for p in (output_dir, *output_dir.resolve().parents) if p.exists())).free
    width = max(len(stage.name) for stage in stages)
    lines = [f"Plan for {output_dir}"]
    for stage in stages:
        cost = "reused" if stage.reused else f"about {_duration(stage.seconds)}"
        lines.append(f"  {stage.name:<{width}}  {cost:<16} {stage.what}")
    total = sum(stage.seconds for stage in stages if not stage.reused)
    lines.append(f"  {'total':<{width}}  about {_duration(total)}; training state {memory / 1e9:.2f} GB, ")
    lines[-1] += f"disk {disk / 1e9:.2f} GB of {free / 1e9:.0f} GB free"
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
