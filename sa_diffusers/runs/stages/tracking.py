"""What a run shows on its way: pictures, what the classifier reads in them, pipelines that training passes through."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.forgetting import measure, spread_rows
from sa_diffusers.evaluation.intervals import wilson_interval
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import Family
from sa_diffusers.io.loading import copy_pipeline, save_pipeline
from sa_diffusers.io.processes import process_state
from sa_diffusers.report.pictures import save_contact_sheet
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.training.lora import fuse_lora


SNAPSHOTS = "snapshots"  # folder of the pipelines that training passes through
TRACKED = ("concept_probability", "retained_accuracy", "retained_worst_accuracy")


def tracker(context: RunContext) -> Callable[[int, dict], bool] | None:
    """A callback that draws pictures while training, lets the classifier read them, and may end the training early.

    It saves the pipeline besides, where that was asked for.
    """
    config, family, inputs, output_dir = context.options, context.family, context.inputs, context.folder
    if config.callback_steps is None:
        return None
    several = len(context.concepts)  # each is looked at, and stops the run by itself
    asking = max(several, config.tracked_of_concept * (several if config.early_stop else 1))
    counts = {"concept": asking, "retained": max(1, config.track_images // 2)}
    sets = {name: _tracked(inputs.sets[name], count) for name, count in counts.items()}

    def track(step: int, row: dict) -> bool:
        if step in config.snapshot_steps and process_state().is_main_process:
            save_snapshot(family, config, snapshot_dir(output_dir, step))
        if not config.track_steps or step % config.track_steps:
            return False
        pictures = draw_sets(family, sets, config.judged)
        for judge in list(inputs.judges.values())[:1]:
            values, _ = measure(judge, sets, pictures)
            row |= {key: values[key] for key in TRACKED}
        sheet = torch.cat([part.images(range(len(part))) for part in pictures.values() if len(part)])
        save_contact_sheet(sheet[:64], output_dir / "progress" / f"step_{step:06d}.png")
        # Of these prompts: what it is in others, the evaluation says.
        if config.early_stop is None:
            return False
        shown = values[f"{TRACKED[0]}_by_concept"] or {"": values[TRACKED[0]]}
        highest = max(wilson_interval(value, len(sets["concept"]) // len(shown))[1] for value in shown.values())
        return highest <= config.early_stop

    return track


def snapshot_dir(run: Path, step: int) -> Path:
    return run / SNAPSHOTS / f"step_{step:06d}"


def save_snapshot(family: Family, config: RunOptions, folder: Path) -> None:
    """Save the pipeline as it is in the middle of training, an adapter fused, and leave it so."""
    passing = copy_pipeline(family.pipeline, family.component)
    module = getattr(passing, family.component)
    if config.lora_rank:
        fuse_lora(module)
    save_pipeline(passing, folder, module, config.dtype, config.save_variant)
    module.to("cpu")  # it and its autocast forward pass hold each other, and the device has no room for that


def _tracked(prompts: PromptSet, count: int) -> PromptSet:
    """`count` of them spread evenly, from seeds of their own.

    The run ends when these pictures say so: those of the examination must not have chosen what they judge.
    """
    part = prompts.take(spread_rows(len(prompts), count))
    requests = [replace(request, seed=derive_seed(request.seed, "tracked")) for request in part.requests]
    return replace(part, requests=requests)
