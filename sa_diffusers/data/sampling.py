"""Draw samples of a model for conditions: on a fixed grid of batches, resumable, shared by processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch, to
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import Family, get_family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.io.loading import copy_pipeline
from sa_diffusers.io.processes import process_state, working
from sa_diffusers.models.memory import TensorBytes, free_memory
from sa_diffusers.models.precision import autocast_forward


MOST = 64  # pictures drawn at once where as many as fit are: more are no faster
ROOM = 0.5  # of the free memory, for their passes


@dataclass(frozen=True)
class Request:
    """One picture to draw; equal requests give equal pictures."""

    condition: Condition
    seed: int
    negative: Condition = Condition()

    @property
    def key(self) -> dict[str, Any]:
        """What it says in the keys of stages."""
        said = {"prompt": self.condition.text, "seed": self.seed, "negative_prompt": self.negative.text}
        labels = {"label": self.condition.label, "negative_label": self.negative.label}  # where there are any
        return said | {name: label for name, label in labels.items() if label is not None}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


@dataclass(frozen=True)
class SamplingSettings:
    """guidance_scale as in diffusers (1: none), the sampler's steps, and pictures at once (None: `largest_batch`)."""

    guidance_scale: float
    num_inference_steps: int
    batch_size: int | None


@dataclass
class DrawingOptions(Options):
    """How pictures are drawn: of the surrogate, and those that a model is judged by."""

    sampler: Literal["dpmsolver++", "ddim", "pipeline"] = option("dpmsolver++", "Sampler; pipeline: the model's own.")
    num_inference_steps: int = option(20, "Steps of the sampler.", above=0)
    guidance_scale: float = option(
        7.5, "Guidance of surrogate and evaluation pictures, as in diffusers (1: none).", least=0
    )
    eval_batch_size: int | None = option(
        None,
        f"Pictures drawn at once in the evaluation; null: as many as fit, at most {MOST}.",
        above=0,
        identity=False,
    )

    @property
    def judged(self) -> SamplingSettings:
        """How the pictures are drawn that a model is judged by."""
        return SamplingSettings(self.guidance_scale, self.num_inference_steps, self.eval_batch_size)


def largest_batch(family: Family) -> int:
    """How many pictures may be drawn at once with guidance: by the tensors of a pass of one, at most MOST."""
    run = blank_pass(family, 1)
    with torch.compiler.set_stance("force_eager"), TensorBytes() as counted:
        run()
    return min(MOST, max(1, int(ROOM * free_memory(family.device) / (family.guided_passes * counted.peak))))


def blank_pass(family: Family, batch_size: int) -> Callable[[], float]:
    """A forward pass of the module, and its loss, on zeros: to be timed, or measured."""
    condition = Condition(family.labels[0]) if family.labels else family.example
    latents = torch.zeros(batch_size, *family.latent_shape)
    batch = to(family.batch(latents, [condition] * batch_size), family.device)
    terms = torch.zeros(batch_size, dtype=torch.long, device=family.device)
    noise = family.loss.sample_noise(batch, torch.Generator())

    def run() -> float:
        with torch.no_grad(), autocast_forward(family.module, family.compute_dtype):
            return float(family.loss(family.module, batch, terms, noise).sum())  # which waits for the device

    return run


def draw_batch(family: Family, requests: Sequence[Request], settings: SamplingSettings) -> Tensor:
    """The latents of some requests, drawn at once: [B, C, h, w] of float32 on the CPU.

    Raises:
        FloatingPointError: they are not finite.
    """
    latents = family.draw(
        [request.condition for request in requests],
        [request.seed for request in requests],
        settings.guidance_scale,
        settings.num_inference_steps,
        [request.negative for request in requests],
    )
    if not torch.isfinite(latents).all():
        asked = requests[0].condition
        raise FloatingPointError(f"the sampler gave values that are not finite for {asked}; use float32")
    return latents


def draw_samples(
    family: Family,
    requests: Sequence[Request],
    settings: SamplingSettings,
    parts_dir: Path | None = None,
    description: str = "sample",
    known: Mapping[str, Tensor] | None = None,
) -> SampleSet:
    """Draw every request; latents are kept as they are, without a decode-encode round trip.

    Args:
        parts_dir: finished batches are kept there until all are drawn, so that an interrupted run goes on after the
            last of them; processes share the work through it. None: nothing is kept, every process draws everything.
        known: latents that this model gave with these settings, by the fingerprints of requests: not drawn again.

    Returns:
        The samples in the order of the requests.
    """
    if known:
        left = [request for request in requests if request.fingerprint not in known]
        new = draw_samples(family, left, settings, parts_dir, description).latents if left else ()
        there = {**known, **{request.fingerprint: latent for request, latent in zip(left, new, strict=True)}}
        drawn = torch.stack([there[request.fingerprint] for request in requests])
        return SampleSet(drawn, [request.condition for request in requests])
    state = process_state()
    starts = range(0, len(requests), settings.batch_size)

    def part(start: int) -> Path:  # by what is asked, since what is `known` may be other the next time
        asked = [request.fingerprint for request in requests[start : start + settings.batch_size]]
        return parts_dir / f"{start:07d}_{fingerprint({'asked': asked})}.safetensors"

    mine = list(starts)[state.process_index :: state.num_processes] if parts_dir is not None else list(starts)
    drawn = {}
    # All at once: the text encoder waits in main memory, and would be fetched for every batch.
    own = [request for start in mine for request in requests[start : start + settings.batch_size]]
    family.prepare([condition for r in own for condition in (r.condition, r.negative)])
    left = [s for s in mine if parts_dir is None or not part(s).exists()]
    there = len(own) - sum(len(requests[start : start + settings.batch_size]) for start in left)
    with working(description, len(own), "images", there) as advance:
        for start in left:
            batch = requests[start : start + settings.batch_size]
            found = SampleSet(draw_batch(family, batch, settings), [request.condition for request in batch])
            if parts_dir is None:
                drawn[start] = found
            else:
                found.save(part(start))
            advance(len(batch))
    state.wait_for_everyone()
    parts = [drawn[start] if parts_dir is None else SampleSet.load(part(start)) for start in starts]
    return SampleSet(torch.cat([p.latents for p in parts]), [request.condition for request in requests])


def frozen_family(family: Family, shared: Iterable[nn.Parameter] = ()) -> Family:
    """The adapter of a copy of the pipeline as it is now, but for weights that stay as they are and are shared."""
    return get_family(copy_pipeline(family.pipeline, family.component, shared))


class FreshSamples:
    """Samples of random conditions drawn anew for every batch, by a model that stays as it is.

    Args:
        family: the adapter of a frozen copy of the pipeline.
        asked: what to draw, each with the same probability.
        shown_as: the conditions to show them under; None: their own.
        with_latents: whether batches hold the "latents" that the samples were decoded from.
    """

    def __init__(
        self,
        family: Family,
        asked: Sequence[Condition],
        shown_as: Sequence[Condition] | None = None,
        with_latents: bool = False,
    ):
        self.family, self.asked = family, list(asked)
        self.shown_as, self.with_latents = list(shown_as or asked), with_latents

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step`; equal arguments give equal batches."""
        chosen = torch.randint(len(self.asked), (batch_size,), generator=seeded(seed, "fresh prompts", step))
        conditions, shown = ([of[index] for index in chosen.tolist()] for of in (self.asked, self.shown_as))
        seeds = [derive_seed(seed, "fresh", step, index) for index in range(batch_size)]
        batch = family.batch(self.family.draw(conditions, seeds, 1.0, 1), shown)
        return batch | {"latents": self.family.prior(seeds)} if self.with_latents else batch


class FreshNoise:
    """Uniform noise in pixel space, drawn anew for every batch, under some conditions in turn.

    Args:
        shown_as: the conditions.
        with_latents: whether batches hold "latents" drawn from the prior: noise tells nothing of its latents.
    """

    def __init__(self, shown_as: Sequence[Condition], with_latents: bool = False):
        self.shown_as, self.with_latents = shown_as, with_latents

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step`; equal arguments give equal batches."""
        generator = seeded(seed, "fresh noise", step)
        size = (batch_size, family.image_channels, family.resolution, family.resolution)
        images = (2 * torch.rand(size, generator=generator) - 1).expand(-1, 3, -1, -1)
        shown = [self.shown_as[(step * batch_size + i) % len(self.shown_as)] for i in range(batch_size)]
        batch = family.batch(family.encode(images, generator), shown)
        if self.with_latents:
            batch["latents"] = torch.randn(batch_size, family.loss.latent_dim, generator=generator)
        return batch
