"""What a run shows on its way: pictures, what the classifier reads in them, pipelines that training passes through."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.replay import concept_captions, spread
from sa_diffusers.data.sampling import Request
from sa_diffusers.evaluation.before_after import look
from sa_diffusers.evaluation.forgetting import Examination, JudgedSet, draw_sets, measure
from sa_diffusers.families import Family
from sa_diffusers.io.loading import copy_pipeline, save_pipeline
from sa_diffusers.io.processes import process_state
from sa_diffusers.report.pictures import save_contact_sheet
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.training.lora import fuse_lora


SNAPSHOTS = "snapshots"  # folder of the pipelines that training passes through
LOOKED_AT = 16  # pictures of each kind where no classifier judges


def tracker(context: RunContext) -> Callable[[int, dict], bool] | None:
    """A callback that draws pictures while training, lets the classifier read them, and may end the training early.

    It saves the pipeline besides, where that was asked for.
    """
    config, family, inputs, output_dir = context.options, context.family, context.inputs, context.folder
    if config.callback_steps is None:
        return None
    half = max(1, config.track_images // 2)

    def track(step: int, row: dict) -> bool:
        if step in config.snapshot_steps and process_state().is_main_process:
            save_snapshot(family, config, output_dir / SNAPSHOTS / f"step_{step:06d}")
        if not config.track_steps or step % config.track_steps:
            return False
        if inputs.exams:
            name, exam = next(iter(inputs.exams.items()))
            concept, retained = _first(exam.concept, half), _first(exam.retained, half)
            exam = Examination(exam.attribute, exam.index, concept, retained=retained)
            images = draw_sets(family, exam.sets, config.judged)
            values, _ = measure(inputs.classifiers[name], exam, images)
            row |= {
                key: values[key] for key in ("concept_probability", "retained_accuracy", "retained_worst_accuracy")
            }
            sheet = torch.cat([images["concept"], images["retained"]])
        else:
            findings = look(family, *(r[:half] for r in requests_to_look_at(context)), config.judged)
            sheet = findings.pictures.float() / 127.5 - 1
        save_contact_sheet(sheet[:64], output_dir / "progress" / f"step_{step:06d}.png")
        return config.early_stop is not None and row["concept_probability"] <= config.early_stop

    return track


def save_snapshot(family: Family, config: RunOptions, folder: Path) -> None:
    """Save the pipeline as it is in the middle of training, an adapter fused, and leave it so."""
    passing = copy_pipeline(family.pipeline, family.component)
    module = getattr(passing, family.component)
    if config.lora_rank:
        fuse_lora(module)
    save_pipeline(passing, folder, module, config.dtype, config.save_variant)
    module.to("cpu")  # it and its autocast forward pass hold each other, and the device has no room for that


def requests_to_look_at(context: RunContext) -> tuple[list[Request], list[Request]]:
    config, inputs = context.options, context.inputs
    captions = [c for c, _ in concept_captions(inputs.templates, inputs.concept, LOOKED_AT, config.seed)]
    others = [prompt for prompt in spread(inputs.prompts, LOOKED_AT * 2, config.seed) if prompt][:LOOKED_AT]
    concept = [Request(Condition(prompt), derive_seed(config.seed, "look", i)) for i, prompt in enumerate(captions)]
    return concept, [
        Request(Condition(p), derive_seed(config.seed, "look at others", i)) for i, p in enumerate(others)
    ]


def _first(judged: JudgedSet, count: int) -> JudgedSet:
    """`count` of them spread evenly, so that every retained class is among them, from seeds of their own.

    The run ends when these pictures say so: those of the examination must not have chosen what they judge.
    """
    picked = torch.linspace(0, len(judged.requests) - 1, min(count, len(judged.requests))).long().tolist()
    requests = [replace(r, seed=derive_seed(r.seed, "tracked")) for r in (judged.requests[i] for i in picked)]
    return JudgedSet(requests, [judged.labels[i] for i in picked])
