"""Draw samples of a model for prompts: on a fixed grid of batches, resumable, shared by processes."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sa_diffusers.data import SampleSet
from sa_diffusers.families import Family
from sa_diffusers.processes import process_state


@dataclass(frozen=True)
class Request:
    """One picture to draw; equal requests give equal pictures."""

    prompt: str
    seed: int
    negative_prompt: str = ""


@dataclass(frozen=True)
class SamplingSettings:
    """guidance_scale as in diffusers (1: none), and the sampler's steps."""

    guidance_scale: float
    num_inference_steps: int
    batch_size: int


def draw_samples(
    family: Family,
    requests: Sequence[Request],
    settings: SamplingSettings,
    parts_dir: Path | None = None,
    description: str = "sample",
) -> SampleSet:
    """Draw every request; latents are kept as they are, without a decode-encode round trip.

    Args:
        parts_dir: finished batches are kept there until all are drawn, so that an interrupted run goes on after the
            last of them; processes share the work through it. None: nothing is kept, every process draws everything.

    Returns:
        The samples in the order of the requests.
    """
    state = process_state()
    starts = range(0, len(requests), settings.batch_size)
    mine = list(starts)[state.process_index :: state.num_processes] if parts_dir is not None else list(starts)
    drawn = {}
    for start in tqdm(mine, desc=description, disable=not state.is_main_process, mininterval=1):
        part_path = parts_dir and parts_dir / f"{start:07d}.safetensors"
        if part_path is not None and part_path.exists():
            continue
        batch = requests[start : start + settings.batch_size]
        latents = family.draw(
            [request.prompt for request in batch],
            [request.seed for request in batch],
            settings.guidance_scale,
            settings.num_inference_steps,
            [request.negative_prompt for request in batch],
        )
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"the sampler gave values that are not finite for {batch[0].prompt!r}; use float32"
            )
        drawn[start] = SampleSet(latents, [request.prompt for request in batch])
        if part_path is not None:
            drawn[start].save(part_path)
    state.wait_for_everyone()
    parts = [SampleSet.load(parts_dir / f"{s:07d}.safetensors") if parts_dir is not None else drawn[s] for s in starts]
    return SampleSet(torch.cat([p.latents for p in parts]), [prompt for p in parts for prompt in p.prompts])


def remove_parts(parts_dir: Path) -> None:
    """Remove the batches of a finished drawing, once its result is saved."""
    state = process_state()
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(parts_dir, ignore_errors=True)
