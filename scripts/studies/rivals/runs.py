"""The runs of a row: each strength becomes a pipeline on the disk, with what it took to make it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from sa_diffusers.families import find_family
from sa_diffusers.io.artifacts import Marker
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import read_model_index
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.tracking import SNAPSHOTS
from sa_diffusers.training.lora import LORA_FILE
from studies.rivals.spec import ConceptSpec, Row


HALF = 2  # bytes of a value as it would be shared
# Options that change the samples, so that those of the reference run cannot be taken.
OWN_SAMPLES = ("num_samples", "empty_prompt_fraction", "replay_guidance_scale", "num_inference_steps", "sampler")


@dataclass(frozen=True)
class Point:
    """A method at one strength.

    Attributes:
        strength: optimiser steps, or the value of the option that the row sweeps.
        pipeline_dir: the pipeline.
        seconds: of every stage the method needs, samples and Fisher included where it uses them, evaluation not.
        megabytes: what has to be shared, in half precision: the weights that differ, or the adapter.
    """

    strength: Any
    pipeline_dir: str
    seconds: float
    megabytes: float


def run_row(spec: ConceptSpec, row: Row, folder: Path, seed: int, reference: Path) -> list[Point]:
    """Run what is not done yet.

    Args:
        reference: folder of a run whose samples and Fisher belong to the same model and seed; its own may be this row.
    """
    points = []
    for strength, config in spec.configs(row, folder, seed):
        own = any(config.__dict__[name] != spec.options.get(name, config.__dict__[name]) for name in OWN_SAMPLES)
        if Path(config.output_dir) != reference and not own:
            config.samples = str(reference / "samples")
            config.fisher = str(reference / "fisher.safetensors") if config.ewc_lambda else None
        config.overwrite = True  # a row that was changed is made again, from the first stage that differs
        outcome = run_forgetting(config)
        seconds = stage_seconds(config, outcome.metrics["seconds"], reference)
        run = Path(config.output_dir)
        if not row.trains:
            points.append(_point(spec, strength, run / "pipeline", seconds, None))
            continue
        train = outcome.metrics["seconds"]["train"]
        lora = run / "lora" / LORA_FILE if config.lora_rank else None
        for step in row.sweep[1]:
            passed = seconds - train * (1 - step / config.num_train_steps)
            points.append(_point(spec, step, run / SNAPSHOTS / f"step_{step:06d}", passed, lora))
    return points


def reference_of(spec: ConceptSpec, folder: Path) -> Path:
    """Of a seed's folder the run that drew the samples of all its rows: ours, unless the table was begun with them in
    another order."""
    drew = (folder / name for name in spec.rows if (folder / name / "samples" / "samples.json").exists())
    return next(drew, folder / spec.ours)


def original_point(spec: ConceptSpec) -> Point:
    return Point("–", resolve(spec.options["model"]), 0.0, 0.0)


def _point(spec: ConceptSpec, strength: Any, pipeline_dir: Path, seconds: float, lora: Path | None) -> Point:
    if lora is not None:
        size = lora.stat().st_size * HALF / 4  # the run saves it in float32
    else:
        size = HALF * _changed(spec.options["model"], pipeline_dir)
    return Point(strength, str(pipeline_dir), seconds, size / 1e6)


def stage_seconds(config: ForgetConfig, own: Mapping[str, float], reference: Path) -> float:
    """Everything from the pipeline to the one that has forgotten, as if nothing had been there.

    Args:
        config: of the run; where it took samples or Fisher from elsewhere, they are the reference's.
        own: seconds of its stages; "sample" also counts those drawn anew without the concept.
        reference: folder of a run that drew samples and estimated the Fisher itself.
    """
    config, total = config.resolved(), own["surrogate"] + own["train"]
    if config.replay_weight or config.ewc_lambda or config.surrogate_target == "model":
        total += own["sample"] + (Marker(reference, "samples", {}).seconds if config.samples else 0.0)
    if config.ewc_lambda:
        total += Marker(reference, "fisher", {}).seconds if config.fisher else own["fisher"]
    return total


def _changed(model: str, pipeline_dir: Path) -> int:
    """Number of values in the trained part's tensors that differ from the original's."""
    before, after = (_load_trained(folder).state_dict() for folder in (resolve(model), str(pipeline_dir)))
    return sum(tensor.numel() for name, tensor in after.items() if not torch.equal(tensor, before[name]))


def _load_trained(folder: str) -> nn.Module:
    index = read_model_index(folder)
    name = find_family(index["_class_name"]).component
    return getattr(diffusers, index[name][1]).from_pretrained(folder, subfolder=name, dtype=torch.float32)
