"""Which of two conditions a model itself takes a picture to be drawn for, where no classifier knows the concept.

It is the one under which the model before forgetting denoises the picture better, paired over times and noise (the
diffusion classifier of Li et al. 2023, arXiv 2303.16203), or, of a VAE, reaches the higher ELBO.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.core.batches import take, to
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.sampling import frozen_family
from sa_diffusers.evaluation.judges.clip import Clip, zero_shot
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import Family
from sa_diffusers.models.precision import autocast_forward, on_device


DRAWS = 8  # times, each with its own noise, that a picture is denoised at
PREFERENCE = "concept_preference"


@dataclass
class PreferenceJudge:
    """Whether the model takes each picture that asks for a concept for it, and not for what takes its place.

    Attributes:
        family: of the model as it was; see `freeze`.
        favoured: whether surrogates in words take their places; else it is the empty prompt or null class, and of a
            model that has none any other class.
        batch_size: pictures denoised at once.
        said_of_noise: kept by `measure_preference`, since it is the same before and after.
    """

    family: Family
    concepts: Concepts
    favoured: bool
    batch_size: int
    said_of_noise: dict = field(default_factory=dict)
    name = "the original model itself"

    @property
    def instead(self) -> str:
        """What the concept is compared with, in words."""
        if self.favoured:
            return _surrogates(self.concepts)
        return "the empty prompt" if self.family.can("guidance") else "every other class"

    @property
    def key(self) -> dict[str, Any]:
        return {"by": self.name, "instead": self.instead, "draws": self._draws}

    @property
    def passes(self) -> float:
        """Forward passes that a picture takes."""
        return self._draws * (1 + len(self.alternatives(self.concepts[0].name)))

    @property
    def _draws(self) -> int:
        return min(DRAWS, self.family.loss.num_terms) if self.family.can("denoising") else DRAWS

    def freeze(self, changed: Collection[str] | None = None) -> None:
        """Keep a copy of the model as it is now, in main memory.

        Args:
            changed: names of all weights that will change; of a model in main memory no others are copied. None: any.
        """
        module = self.family.module
        alone = changed is None or self.family.device.type != "cpu"
        self.family = frozen_family(
            self.family, () if alone else [weight for name, weight in module.named_parameters() if name not in changed]
        )
        self.family.module.eval().to("cpu")

    def alternatives(self, prompt: str) -> list[str]:
        """What a picture of a prompt could have been asked for by instead."""
        if self.favoured:
            return [self.concepts.replaced_in(prompt)]
        return [""] if self.family.can("guidance") else [name for name in self.family.labels if name != prompt]

    def __call__(self, images: Tensor, prompts: PromptSet, before: Tensor | None) -> dict[str, Tensor]:
        if prompts.purpose != "asks":
            return {}
        rows, size = range(len(images)), self.batch_size
        seeds, asked = [request.seed for request in prompts.requests], prompts.prompts
        parts = [self._gaps(images[i : i + size], asked[i : i + size], seeds[i : i + size]) for i in rows[::size]]
        return {PREFERENCE: (torch.cat(parts) > 0).double()}

    @torch.no_grad()
    def _gaps(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """How much worse each picture is denoised under the best of its alternatives than under its prompt: [B]."""
        family, alternatives = self.family, list(map(self.alternatives, prompts))
        both = zip(images, seeds, strict=True)
        latents = torch.cat([family.encode(image[None], seeded(seed, "judge")) for image, seed in both])
        choices = [prompts, *zip(*alternatives, strict=True)]
        conditions = [Condition(text) for chosen in choices for text in chosen]
        batch = family.batch(torch.cat([latents] * len(choices)), conditions)
        one = {"sample": latents[:1]}
        noise = torch.stack(
            [
                torch.cat([family.loss.sample_noise(one, seeded(seed, "judge", draw)) for seed in seeds])
                for draw in range(self._draws)
            ]
        )
        terms = (2 * torch.arange(self._draws) + 1) * family.loss.num_terms // (2 * self._draws)
        errors = []
        half = None if family.module.dtype == torch.float32 else family.module.dtype
        with on_device(family.module, family.device) as module, autocast_forward(module, half):
            # Of every time, choice and picture.
            for rows in torch.arange(self._draws * len(conditions)).split(self.batch_size):
                draw, place = rows // len(conditions), rows % len(conditions)
                paired = terms[draw].to(family.device), noise[draw, place % len(images)].to(family.device)
                errors.append(family.loss(module, to(take(batch, place), family.device), *paired).double().cpu())
        errors = torch.cat(errors).view(self._draws, len(choices), len(images)).sum(0)
        return errors[1:].amin(0) - errors[0]


@dataclass
class ClipPreferenceJudge:
    """The same by CLIP: which of two names fits a picture better."""

    clip: Clip
    concepts: Concepts
    said_of_noise: dict = field(default_factory=dict)
    passes = 0.0

    @property
    def key(self) -> dict[str, Any]:
        return {"by": self.name, "instead": self.instead}

    def freeze(self, changed: Collection[str] | None = None) -> None:
        """It has nothing of the model."""

    @property
    def name(self) -> str:
        return f"CLIP ({self.clip.name})"

    @property
    def instead(self) -> str:
        return _surrogates(self.concepts)

    def __call__(self, images: Tensor, prompts: PromptSet, before: Tensor | None) -> dict[str, Tensor]:
        if prompts.purpose != "asks":
            return {}
        pairs = {one.name: (one.name, one.surrogate) for one in self.concepts}
        names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
        asked = [pairs[one.word or self.concepts[0].name] for one in prompts.candidates]
        columns = torch.tensor([[names.index(name) for name in pair] for pair in asked])
        own, other = zero_shot(self.clip, images, names).cpu().gather(1, columns).T
        return {PREFERENCE: (own > other).double()}


def _surrogates(concepts: Concepts) -> str:
    return f"“{concepts[0].surrogate}”" if len(concepts) == 1 else "what takes its place"
