"""What a run is about to do and what it will cost, from one timed forward pass; what cannot fit is refused."""

import math
import time

import psutil
import torch

from sa_diffusers.core.batches import to
from sa_diffusers.core.conditions import Condition
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import check_disk
from sa_diffusers.io.stages import Stages
from sa_diffusers.models.precision import autocast_forward, free_memory
from sa_diffusers.runs.context import RunContext


FLOAT32 = 4  # bytes


class NotEnoughMemory(RuntimeError):
    """The weights, gradients and optimiser state alone exceed the memory."""


def seconds_per_sample(family: Family, batch_size: int) -> float:
    """Seconds of one UNet forward pass per sample, timed on zeros after one pass that warms up."""
    latents = torch.zeros(batch_size, *family.latent_shape)
    condition = Condition(family.labels[0] if family.labels else "")
    batch = to(family.batch(latents, [condition] * batch_size), family.device)
    terms = torch.zeros(batch_size, dtype=torch.long, device=family.device)
    noise = family.loss.sample_noise(batch, torch.Generator())
    elapsed = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad(), autocast_forward(family.module, family.compute_dtype):
            float(family.loss(family.module, batch, terms, noise).sum())  # float() waits for the device
        elapsed = time.perf_counter() - start
    return elapsed / batch_size


def trained_bytes(context: RunContext) -> int:
    """Memory that training takes on the device beside the pipeline and activations.

    These are gradients, Adam's averages, EWC's Fisher and anchor, the weights' moving average, and the frozen copy,
    whose weights are the anchor then; with adapters these, and the Fisher of what they adapt.
    """
    family, config = context.family, context.options
    if not context.method.trains:
        return 0
    held = ewc = sum(p.numel() for p in family.trainable(config.train_scope).values())
    stepped = held
    if config.lora_rank:
        layers = [
            family.module.get_submodule(name)
            for name in family.adapted_layers(config.train_scope, config.lora_targets)
        ]
        ewc = sum(layer.weight.numel() for layer in layers)
        stepped = sum(config.lora_rank * (len(w) + w[0].numel()) for w in (layer.weight for layer in layers))
        held = 0
    adam = 2 if config.optimizer == "adamw_8bit" else 2 * FLOAT32
    total = stepped * (FLOAT32 + adam + (FLOAT32 if config.ema_decay is not None else 0))
    if config.lora_rank:
        total += FLOAT32 * stepped
    elif "frozen" in context.needs:
        total += FLOAT32 * sum(p.numel() for p in family.module.parameters())
        held = 0  # the frozen copy's weights are the anchor
    if config.ewc_lambda and config.ewc_device == "device":
        total += ewc * (2 if config.ewc_dtype == "bfloat16" else FLOAT32) + FLOAT32 * held
    return total


def disk_bytes(context: RunContext) -> int:
    """Room for pipeline, Fisher, samples and checkpoints (one more than kept, while the newest is written)."""
    family, config = context.family, context.options
    modules = [m for m in family.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    pipeline = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    trained = FLOAT32 * sum(p.numel() for p in family.module.parameters())
    kept = config.checkpoints_total_limit + 1 if config.checkpointing_steps else 0
    latents = (config.num_samples * 2 + config.num_surrogate_samples) * math.prod(family.latent_shape) * FLOAT32
    return int(pipeline + (trained if config.ewc_lambda else 0) + kept * 4 * trained + latents)


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


def announce(context: RunContext, stages: Stages) -> str:
    """The plan as text. Raises NotEnoughMemory or DiskFull where the run cannot fit."""
    memory, disk = trained_bytes(context), disk_bytes(context)
    check_memory(memory, context.family.device)
    free = check_disk(context.folder, disk)
    per_pass = seconds_per_sample(context.family, context.options.sample_batch_size)
    width = max(len(stage.name) for stage in stages.stages)
    lines, total = [f"Plan for {context.folder}"], 0.0
    for stage in stages.stages:
        seconds = 0.0 if stage.name in stages.done else stage.passes(context) * per_pass
        given = stage.name not in stages.markers
        cost = "given" if given else "reused" if stage.name in stages.done else f"about {_duration(seconds)}"
        what = f"from {getattr(context.options, stage.name)}" if given else stage.describe(context)
        lines.append(f"  {stage.name:<{width}}  {cost:<16} {what}")
        total += seconds
    lines.append(
        f"  {'total':<{width}}  about {_duration(total)}; training state {memory / 1e9:.2f} GB, disk {disk / 1e9:.2f} "
        f"GB of {free / 1e9:.0f} GB free"
    )
    return "\n".join([*lines, *(f"  {note}" for note in context.inputs.notes)])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
