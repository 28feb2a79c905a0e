"""Bring a concept back from a picture of it: inverted without any text, noised and drawn on, or half of it hidden.

Inversion is DDIM's (Mokady et al. 2023) from the empty prompt, without guidance (a model that is told a guidance is
told what it was trained with, both ways); noised pictures are SDEdit (Meng et al. 2022); what is hidden is filled as
in RePaint (Lugmayr et al. 2022), without its resampling. All walk along the deterministic path of diffusion (DDIM,
Song et al. 2021, Eq. 12 with eta 0), which of a flow is Euler's method.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch, to
from sa_diffusers.families import Family
from sa_diffusers.families.text_to_image.template_encoder import PLACE
from sa_diffusers.io.atomic_files import explain_read_errors, load_tensors, save_tensors
from sa_diffusers.io.processes import progress_bar
from sa_diffusers.models.precision import autocast_forward


CLEAN = -1  # the term that has no noise
INVERSION_STEPS = 50  # at least, each way: with fewer a picture is lost on the way whatever the model has forgotten
Settle = Callable[[Tensor, Tensor], Tensor]


def path(family: Family, num_steps: int, strength: float = 1.0) -> list[int]:
    """Terms of the loss from a share of the noise down to none, in that share of the steps, evenly spaced."""
    top = max(1, round(strength * family.loss.num_terms)) - 1
    count = min(max(1, round(strength * num_steps)), top + 1)
    return [*torch.linspace(top, CLEAN, count + 1).round().int().tolist()]


@torch.no_grad()
def walk(
    family: Family,
    latents: Tensor,
    terms: Sequence[int],
    told: Batch,
    avoided: Batch | None = None,
    guidance_scale: float = 1.0,
    settle: Settle | None = None,
) -> Tensor:
    """Latents [B, C, h, w] at the first of `terms` as they are at the last, on the device.

    The noise of a step is predicted as of the noisier of its ends, so that up and down undo each other but for an
    error of second order in the step.

    Args:
        told, avoided: what prompts are encoded as, and what guidance leads away from; None: no guidance.
        settle: what becomes of the latents at a term [B], after a step to it.
    """
    loss, device = family.loss, family.device
    latents, told = latents.to(device), to(told, device)
    avoided = None if avoided is None else to(avoided, device)
    with autocast_forward(family.module, family.compute_dtype):
        for here, there in (
            torch.tensor(pair)[:, None].expand(2, len(latents)).to(device) for pair in pairwise(terms)
        ):
            times = loss.times(torch.maximum(here, there))
            predicted = loss.call(family.module, latents, times, told)
            if avoided is not None:
                away = loss.call(family.module, latents, times, avoided)
                predicted = away + guidance_scale * (predicted - away)
            latents = _mixed(family, *loss.parts(predicted, latents, here), there)
            latents = latents if settle is None else settle(latents, there)
    return latents


def _mixed(family: Family, sample: Tensor, noise: Tensor, terms: Tensor) -> Tensor:
    signal_scale, noise_scale = family.loss.scales(sample, terms)
    return signal_scale * sample + noise_scale * noise


@dataclass(frozen=True, eq=False)
class FoundPictures:
    """What is drawn from in place of noise alone.

    Attributes:
        latents: pictures of the concept [N, C, h, w]; or for `inversion` the noise that they lead back to.
        text: the concept's word, in the place of {}; "": all is drawn by the empty prompt, without guidance.
        strength: share of the noise that pictures begin at.
    """

    latents: Tensor
    attack: str
    text: str = ""
    strength: float = 1.0
    losses: list[float] = field(default_factory=list)  # none: nothing is searched

    def save(self, path: str | Path) -> None:
        said = {"attack": self.attack, "text": self.text, "strength": self.strength}
        save_tensors({"latents": self.latents}, path, **said)

    @classmethod
    def load(cls, path: str | Path) -> "FoundPictures":
        tensors, notes = load_tensors(path)
        with explain_read_errors(path):
            return cls(**tensors, **notes)

    def draw(
        self,
        family: Family,
        templates: Sequence[str],
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        batch_size: int,
    ) -> Tensor:
        """One a seed and picture of the concept, [N, C, h, w]: as many as there are of both."""
        inverted = self.attack == "inversion"  # where seeds count for nothing
        count = min(len(seeds), len(self.latents))
        steps = max(INVERSION_STEPS, num_inference_steps) if inverted else num_inference_steps
        terms, drawn = path(family, steps, self.strength), []
        guided = self.text and guidance_scale > 1 and family.guided_passes > 1  # as pipelines have it
        for start in progress_bar(range(0, count, batch_size), "draw", "batches"):
            places = range(start, min(start + batch_size, count))
            latents, settle = self.latents[places.start : places.stop].to(family.device), None
            told = [
                templates[place % len(templates)].replace(PLACE, self.text) if self.text else "" for place in places
            ]
            avoided = family.embed([""] * len(told)) if guided else None
            if not inverted:
                noise = torch.stack([_noise(family, seeds[place]) for place in places]).to(latents)
                mixed = partial(_mixed, family, latents, noise)
                halves = [place // len(templates) for place in places]  # so that each template meets every half
                hidden = torch.stack([hidden_half(half, *latents.shape[-2:]) for half in halves])[:, None]
                if self.attack == "inpainting":
                    settle = partial(_filled, hidden.to(latents.device), mixed)
                latents = mixed(torch.full((len(told),), terms[0], device=latents.device))
                latents = latents if settle is None else torch.where(hidden.to(latents.device), noise, latents)
            with family.told_guidance(guidance_scale) if self.text else nullcontext():
                drawn.append(walk(family, latents, terms, family.embed(told), avoided, guidance_scale, settle).cpu())
        return torch.cat(drawn)


def _noise(family: Family, seed: int) -> Tensor:
    return torch.randn(family.latent_shape, generator=Generator().manual_seed(seed))


def _filled(hidden: Tensor, mixed: Callable[[Tensor], Tensor], latents: Tensor, terms: Tensor) -> Tensor:
    """Latents where they are hidden, and elsewhere what is known, with the noise of the terms."""
    return torch.where(hidden, latents, mixed(terms))


def hidden_half(place: int, height: int, width: int) -> Tensor:
    """Booleans [h, w]: of pictures in turn the right, lower, left and upper half."""
    rows, columns = torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width)
    halves = columns >= width // 2, rows >= height // 2, columns < width // 2, rows < height // 2
    return halves[place % 4]


def invert(family: Family, latents: Tensor, num_inference_steps: int, batch_size: int) -> FoundPictures:
    """The noise that pictures [N, C, h, w] lead back to by the empty prompt."""
    terms, parts = path(family, max(INVERSION_STEPS, num_inference_steps))[::-1], latents.split(batch_size)
    bar = progress_bar(parts, "invert", "batches")
    return FoundPictures(
        torch.cat([walk(family, p, terms, family.embed([""] * len(p))) for p in bar]).cpu(), "inversion"
    )
