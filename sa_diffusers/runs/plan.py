"""What a run is about to do and what it will cost, from one timed forward pass; what cannot fit is refused."""

import math
import time
from collections.abc import Collection

import torch

from sa_diffusers.core.batches import map_tensors
from sa_diffusers.data.sampling import blank_pass
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import check_disk
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Stages
from sa_diffusers.models.memory import free_memory
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.options import RunOptions


FLOAT32 = 4  # bytes
MUCH = 4 * 10**9  # bytes of main memory that are worth a word


class NotEnoughMemory(RuntimeError):
    """The weights, gradients and optimiser state alone exceed the memory."""


def seconds_per_sample(family: Family, batch_size: int) -> float:
    """Seconds of one forward pass of the trained part per sample, timed on zeros after one pass that warms up."""
    run, elapsed = blank_pass(family, batch_size), 0.0
    for _ in range(2):
        start = time.perf_counter()
        run()
        elapsed = time.perf_counter() - start
    return elapsed / batch_size


def _stepped(context: RunContext) -> tuple[int, int]:
    """How many numbers are trained, and of how many weights they are: with adapters fewer, and of what these adapt."""
    family, config = context.family, context.options
    if not config.lora_rank:
        return (sum(p.numel() for p in family.trainable(config.train_scope).values()),) * 2
    names = family.adapted_layers(config.train_scope, config.lora_targets)
    weights = [family.module.get_submodule(name).weight for name in names]
    return sum(config.lora_rank * (len(w) + w[0].numel()) for w in weights), sum(w.numel() for w in weights)


def _adam(config: RunOptions) -> int:
    """Bytes of Adam's averages for a number that is trained."""
    return 2 if config.optimizer == "adamw_8bit" else 2 * FLOAT32


def trained_bytes(context: RunContext) -> int:
    """Memory that training takes on the device beside the pipeline and activations.

    These are gradients, Adam's averages, EWC's Fisher and anchor, the weights' moving average, and the frozen copy,
    whose weights are the anchor then; with adapters these, and the Fisher of what they adapt.
    """
    family, config = context.family, context.options
    if not context.method.trains:
        return 0
    stepped, ewc = _stepped(context)
    held = 0 if config.lora_rank else stepped
    total = stepped * (FLOAT32 + _adam(config) + (FLOAT32 if config.ema_decay is not None else 0))
    if config.lora_rank:
        total += FLOAT32 * stepped
    elif "frozen" in context.needs:
        total += FLOAT32 * sum(p.numel() for p in family.module.parameters())
        held = 0  # the frozen copy's weights are the anchor
    if config.ewc_lambda and config.ewc_device == "device":
        total += ewc * (2 if config.ewc_dtype == "bfloat16" else FLOAT32) + FLOAT32 * held
    return total


def disk_bytes(context: RunContext, left: Collection[str]) -> int:
    """Room for what the stages named in `left` will write: samples, Fisher and its sums, checkpoints, pipelines.

    Of checkpoints one more than are kept, while the newest is written, less those that are there to go on from.
    """
    family, config = context.family, context.options
    dtype = getattr(torch, config.dtype)  # the trained module is in float32 only while it is trained
    modules = [m for m in family.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    sizes = [(p.numel(), dtype if m is family.module else p.dtype) for m in modules for p in m.parameters()]
    pipeline = sum(count * (kind.itemsize + (2 if config.save_variant else 0)) for count, kind in sizes)
    module = FLOAT32 * sum(p.numel() for p in family.module.parameters())
    latent = FLOAT32 * math.prod(family.latent_shape)
    needed = {"samples": config.num_samples * latent, "replay_samples": config.num_samples * latent}
    needed["before"] = sum(map(len, context.inputs.sets.values())) * latent
    needed |= dict.fromkeys(("surrogate", "concept_samples"), config.num_surrogate_samples * latent)
    stepped, adapted = _stepped(context) if context.method.trains else (0, 0)
    fisher = module if config.fisher_layers == "all" else FLOAT32 * adapted
    needed |= {"fisher": 2 * fisher, "train": pipeline, "merge": pipeline}
    needed["choice"] = 2 * pipeline  # and what training left
    if context.method.trains:
        needed["train"] += pipeline * len(config.snapshot_steps) + (FLOAT32 * stepped if config.lora_rank else 0)
        if every := config.checkpointing_steps:
            there = len(list((context.folder / "checkpoints").glob("step_*[0-9]")))
            written = min(config.checkpoints_total_limit + 1, -(-config.num_train_steps // every))
            average = 0 if config.ema_decay is None else FLOAT32
            needed["train"] += max(written - there, 1) * stepped * (FLOAT32 + _adam(config) + average)
    return sum(needed.get(name, 0) for name in left)


def check_memory(needed: int, device: torch.device) -> int:
    """Free bytes on the device; raises NotEnoughMemory if `needed` exceeds them."""
    free = free_memory(device)
    if needed > free:
        raise NotEnoughMemory(
            f"training needs {needed / 1e9:.1f} GB beside the model, {device} has {free / 1e9:.1f} GB free: use "
            "--lora_rank 8, --train_scope xattn, --ewc_device cpu, --optimizer adamw_8bit, or a larger device"
        )
    return free


def announce(context: RunContext, stages: Stages) -> str:
    """The plan as text. Raises NotEnoughMemory or DiskFull where the run cannot fit."""
    memory, disk = trained_bytes(context) if "train" in stages.left else 0, disk_bytes(context, stages.left)
    check_memory(memory, context.family.device)
    free = check_disk(context.folder, disk)
    per_pass = seconds_per_sample(context.family, context.options.sample_batch_size) if stages.left else 0.0
    processes = process_state().num_processes  # which share every stage
    width = max(len(stage.name) for stage in stages.stages)
    lines, total = [f"Plan for {context.folder}"], 0.0
    for stage in stages.stages:
        seconds = 0.0 if stage.name in stages.done else stage.passes(context) * per_pass / processes
        given = stage.name not in stages.markers
        cost = "given" if given else "reused" if stage.name in stages.done else f"about {_duration(seconds)}"
        source = getattr(context.options, stage.name, None) or "what ships with the model"
        what = f"from {source}" if given else stage.describe(context)
        lines.append(f"  {stage.name:<{width}}  {cost:<16} {what}")
        total += seconds
    lines.append(
        f"  {'total':<{width}}  about {_duration(total)}; training state {memory / 1e9:.2f} GB, disk {disk / 1e9:.2f} "
        f"GB of {free / 1e9:.0f} GB free"
    )
    notes = [*context.inputs.notes, *_embeddings(context)] if stages.left else context.inputs.notes
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _embeddings(context: RunContext) -> list[str]:
    """What encoded prompts may take in main memory, where that is much."""
    if not context.family.can("text"):
        return []
    sizes: list[int] = []
    map_tensors(context.family.embed([""]), lambda tensor: sizes.append(tensor.nbytes))
    count = len(set(context.prompts))
    total = count * sum(sizes)
    return [f"up to {total / 1e9:.0f} GB of main memory for {count:,} encoded prompts"] if total > MUCH else []


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
