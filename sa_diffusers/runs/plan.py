"""What a run is about to do and what it will cost, from one timed forward pass; what cannot fit is refused."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sa_diffusers.families import Family
from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.methods.building import distils, needs_frozen
from sa_diffusers.models.precision import autocast_forward, free_memory
from sa_diffusers.runs.options import ESD_METHODS, ForgetConfig


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
    batch = {k: v.to(family.device) for k, v in family.batch(latents, [prompt] * batch_size).items()}
    terms = torch.zeros(batch_size, dtype=torch.long, device=family.device)
    noise = family.loss.sample_noise(batch, torch.Generator())
    elapsed = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad(), autocast_forward(family.module, family.compute_dtype):
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
        "train": config.num_train_steps * config.train_batch_size * training_passes(config) * per_sample,
        "evaluate": drawing(2 * num_evaluated, config.guidance_scale),
    }


def training_passes(config: ForgetConfig) -> float:
    """Forward passes that a training step is worth, a sample of `train_batch_size`."""
    esd = config.method in ESD_METHODS or config.method == "sa+esd"
    rows = (config.method not in ESD_METHODS) + (config.replay_weight > 0) + esd
    passes = rows * (1 + BACKWARD + config.gradient_checkpointing)
    passes += distils(config) + (config.surrogate_target == "model")
    if esd:  # two frozen passes, and on average half of the sampler's levels with guidance
        passes += 2 + (config.esd_inference_steps - 1)
    return passes


def trained_bytes(family: Family, config: ForgetConfig) -> int:
    """Memory that training takes on the device beside the pipeline and activations.

    These are gradients, Adam's averages, EWC's Fisher and anchor, the weights' moving average, and the frozen copy,
    whose weights are the anchor then; with adapters these, and the Fisher of what they adapt.
    """
    held = ewc = sum(p.numel() for p in family.trainable(config.train_scope).values())
    stepped = held
    if config.lora_rank:
        layers = [
            family.module.get_submodule(name)
            for name in adapted_layers(family.module, config.train_scope, config.lora_targets)
        ]
        ewc = sum(layer.weight.numel() for layer in layers)
        stepped = sum(config.lora_rank * (len(w) + w[0].numel()) for w in (layer.weight for layer in layers))
        held = 0
    adam = 2 if config.optimizer == "adamw_8bit" else 2 * FLOAT32
    total = stepped * (FLOAT32 + adam + (FLOAT32 if config.ema_decay is not None else 0))
    if config.lora_rank:
        total += FLOAT32 * stepped
    elif needs_frozen(config):
        total += FLOAT32 * sum(p.numel() for p in family.module.parameters())
        held = 0  # the frozen copy's weights are the anchor
    if config.ewc_lambda and config.ewc_device == "device":
        total += ewc * (2 if config.ewc_dtype == "bfloat16" else FLOAT32) + FLOAT32 * held
    return total


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
        free = free_memory(device)
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise NotEnoughMemory(
            f"training needs {needed / 1e9:.1f} GB beside the model, {device} has {free / 1e9:.1f} GB free: use "
            "--lora_rank 8, --train_scope xattn, --ewc_device cpu, --optimizer adamw_8bit, or a larger device"
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
