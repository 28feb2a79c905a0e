"""What attacks minimise: the model's own denoising loss on target pictures, under templates filled with vectors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch, map_tensors
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families import Family
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.models.precision import autocast_forward, kept_state


NUM_FIXED = 64  # (latent, template, noise, timestep) on which all candidates of an attack are compared


@dataclass
class AttackSettings(Options):
    """How an attack searches. Raises ValueError for a number out of range."""

    num_tokens: int = option(1, "K, the vectors or tokens that take the concept's place.", least=1)
    steps: int = option(200, "Steps of Adam.", least=1)
    batch_size: int = option(8, "Targets a step, each with its own noise and timestep.", least=1)
    learning_rate: float = option(0.1, "Of Adam, as a share of the root mean square of the token table.", above=0)
    seed: int = option(0, "Seed of every random number.")
    initial: str | None = option(None, "Words to start from; None: what the attack says.")
    keep_every: int = option(50, "Steps between two records, of which the best is kept.", least=1)
    relearn_pictures: int = option(16, "Targets that are trained on, where the attack trains.", least=1)
    relearn_rate: float = option(1e-3, "Of Adam, there.", above=0)

    def optimizer(self, vectors: Tensor, scale: float) -> torch.optim.Adam:
        """Adam for vectors [K, D]; models differ in the scale of their token tables, and Adam moves by its rate."""
        return torch.optim.Adam([vectors], lr=self.learning_rate * scale)


class TargetLoss:
    """The denoising loss on target latents [N, C, h, w] under filled templates, within `frozen_model`; no guidance."""

    def __init__(self, family: Family, encoder: TemplateEncoder, latents: Tensor, settings: AttackSettings):
        self.family, self.encoder, self.latents = family, encoder, latents
        self.batch_size, self.seed = settings.batch_size, settings.seed

    def at_step(self, vectors: Tensor, step: int) -> Tensor:
        """The mean over a batch with noise and timesteps of its own, a function of (seed, step); a scalar."""
        generator = seeded(self.seed, "prompt attack", step)
        chosen = torch.randint(len(self.latents), (self.batch_size,), generator=generator).tolist()
        rows = torch.randint(len(self.encoder.templates), (self.batch_size,), generator=generator).tolist()
        value = self._values(vectors, chosen, rows, generator).mean()
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss of step {step} is not finite; lower the learning rate or use float32")
        return value

    def fixed(self, vectors: Tensor) -> float:
        """The mean over the same NUM_FIXED latents, templates, noises and timesteps at every call, of any attack."""
        return fmean(self.fixed_parts(vectors))

    @torch.no_grad()
    def fixed_parts(self, vectors: Tensor, rival: Sequence[float] = ()) -> list[float]:
        """The means over 16 of them each; a race, which ends early, with fewer parts, above a rival's sum."""
        parts: list[float] = []
        for start in range(0, NUM_FIXED, 16):
            if rival and sum(parts) > sum(rival[: len(parts)]):
                break
            places = range(start, start + 16)
            chosen = [place % len(self.latents) for place in places]
            rows = [place % len(self.encoder.templates) for place in places]
            values = self._values(vectors, chosen, rows, seeded("prompt attack, fixed", start))
            parts.append(values.mean().item())
        return parts

    def _values(self, vectors: Tensor, chosen: list[int], rows: list[int], generator: Generator) -> Tensor:
        """The loss of each chosen target [B]; their timesteps are drawn from B equal parts of all, one each."""
        family, count = self.family, len(chosen)
        sample = self.latents[chosen].to(family.device)
        encoded = map_tensors(self.encoder(vectors, rows), lambda tensor: tensor.to(sample.dtype))
        batch: Batch = {"sample": sample} | encoded
        places = torch.arange(count) + torch.rand(count, generator=generator)
        terms = (places * family.loss.num_terms / count).long().clamp_max(family.loss.num_terms - 1)
        noise = family.loss.sample_noise(batch, generator)
        return family.loss(family.module, batch, terms.to(family.device), noise)


def prepare(
    family: Family, latents: Tensor, templates: Sequence[str], concept_words: Sequence[str], settings: AttackSettings
) -> TargetLoss:
    """The loss that an attack of these arguments minimises; raises as `attack_embedding`."""
    if not family.can("token_embedding"):
        raise TypeError(f"expected a text-to-image model, whose prompts are free text, got a {type(family).__name__}")
    if latents.dim() != 4 or tuple(latents.shape[1:]) != family.latent_shape or len(latents) == 0:
        expected = ", ".join(map(str, family.latent_shape))
        raise ValueError(f"expected target latents [N, {expected}], at least one, got {list(latents.shape)}")
    if not concept_words or not all(word.strip() for word in concept_words):
        raise ValueError(f"expected words for the concept, such as ['seven', '7'], got {list(concept_words)}")
    encoder = TemplateEncoder(family, templates, settings.num_tokens)
    encoder.check_places(settings.initial or concept_words[0])
    return TargetLoss(family, encoder, latents, settings)


@contextmanager
def frozen_model(family: Family) -> Iterator[None]:
    """Within the block model and text encoder take no gradient and draw no dropout; afterwards they are as before."""
    modules = (family.module, *family.text_encoders)
    with (
        kept_state(modules),
        family.encoders_at_hand(),
        autocast_forward(family.module, family.compute_dtype),
        torch.enable_grad(),  # whatever the caller's setting is
    ):
        for module in modules:
            module.requires_grad_(False)
        yield
