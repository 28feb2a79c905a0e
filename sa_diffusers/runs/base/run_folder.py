"""What every training of a base model has in common: a folder of its own, and a model saved there by one process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.objectives import Objective
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import Marker, hash_tensors, read_marker, run_lock
from sa_diffusers.io.atomic_files import remove_leftovers
from sa_diffusers.io.configuration import identity_names, option
from sa_diffusers.io.loading import save_pipeline
from sa_diffusers.io.processes import process_state
from sa_diffusers.training.loop import train
from sa_diffusers.training.options import TrainingConfig


SHOWN = 64  # pictures that tell a data set from others
PLACED = "data", "parts"  # folders that may be there first: of MNIST's strokes, and of parts of a base that are given


@dataclass
class BaseOptions(TrainingConfig):
    """The folder of a training, its threads and its seed."""

    output_dir: str = option("runs/base", "Folder of the run; `pipeline/` inside is the model.", identity=False)
    num_threads: int | None = option(
        None, "CPU threads; null: as the environment says (`accelerate launch` says 1).", above=0, identity=False
    )
    seed: int = option(0, "Seed of every random number.", least=0)


def claim_folder(config: BaseOptions, pictures: str | None = None) -> None:
    """Make the folder this configuration's, by a marker. Raises StageMismatch: it is another's, or other pictures'."""
    key = {name: getattr(config, name) for name in identity_names(type(config))}
    key |= {} if pictures is None else {"pictures": pictures}  # None: not known yet
    claim = Marker(config.output_dir, "base", key, "Pass another --output_dir, or remove this folder first.")
    claim.refuse_others(*PLACED)
    before = {"pictures": pictures} | read_marker(claim.path)["key"] if claim.path.exists() else {}
    if {name: before.get(name) for name in key} != key and not claim.done():  # older ones also say how it is watched
        claim.finish(0.0)


def told_by(count: int, image: Callable[[int], Tensor]) -> str:
    """What tells a data set from others: how many pictures it has, and some of them from all over it."""
    shown = range(0, count, max(1, count // SHOWN))
    return f"{count}: {hash_tensors({str(index): image(index).contiguous() for index in shown})[:16]}"


def flip_half(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image of [B, C, H, W] from left to right with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


@contextmanager
def claimed(config: BaseOptions, pictures: str) -> Iterator[Path]:
    """The folder of a training, claimed as by `claim_folder`, and kept from other runs for the block.

    Args:
        pictures: what `told_by` says of those that are trained on.

    Raises:
        RunFolderBusy: another run works in it.
        StageMismatch: the folder holds a run of another configuration.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    output_dir, main = Path(config.output_dir), process_state().is_main_process
    with run_lock(output_dir) if main else nullcontext():
        if main:
            claim_folder(config, pictures)
            remove_leftovers(output_dir)
        yield output_dir


def part_settings(config: BaseOptions, part: str, steps: int, warmup: int, **options: Any) -> TrainingConfig:
    """How a part is trained before the rest: by the options that start with its name, and a cosine."""
    return TrainingConfig(
        num_train_steps=steps,
        train_batch_size=getattr(config, f"{part}_batch_size"),
        learning_rate=getattr(config, f"{part}_learning_rate"),
        lr_scheduler="cosine",
        lr_warmup_steps=min(warmup, steps // 10),
        mixed_precision=config.mixed_precision,
        checkpointing_steps=config.checkpointing_steps,
        **options,
    )


def train_pipeline(
    family: Family,
    objective: Objective,
    batches: Callable[[int], Batch],
    config: BaseOptions,
    pictures: str,
    **options: Any,
) -> DiffusionPipeline:
    """Train a family's module, and save its pipeline as `<output_dir>/pipeline`; an interrupted run goes on.

    Args:
        pictures: as of `claimed`.
        options: of `train`, as its description.

    Raises as `claimed`.
    """
    with claimed(config, pictures) as folder:
        options |= {"checkpoint_dir": folder / "checkpoints", "log_dir": folder / "logs"}
        train(family.module, objective, batches, config, seed=derive_seed(config.seed, "train"), **options)
        save_model(family.pipeline, folder / "pipeline", getattr(config, "save_dtype", "float32"))
    return family.pipeline


def save_model(model: DiffusionPipeline | ModelMixin, path: Path, dtype: str = "float32") -> None:
    """Save a model, in `dtype`, while other processes wait; it stays float32, and its weights are the rounded ones."""
    if process_state().is_main_process:
        save_pipeline(model, path, model, dtype)
    process_state().wait_for_everyone()
