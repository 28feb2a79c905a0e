"""What the attacks on a text-to-image model's prompt share: the settings, the loss on target pictures, the drawing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Generator, Tensor

from sa_diffusers.core.losses import Batch
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families.stable_diffusion import TextToImageFamily
from sa_diffusers.models.precision import autocast_forward, on_device


PLACE = "{}"  # where the concept stands in a template
NUM_FIXED = 64  # (latent, template, noise, timestep) on which all candidates of an attack are compared


@dataclass(frozen=True)
class AttackSettings:
    """How an attack searches.

    Attributes:
        num_tokens: K, the vectors or tokens that take the concept's place.
        steps: of Adam.
        batch_size: targets a step, each with its own noise and timestep.
        learning_rate: of Adam, as a share of the root mean square of the token table's entries: tables of different
            models differ in scale, and Adam moves every entry by about its rate a step.
        seed: of every random number.
        initial: words to start from; None: what the attack says.
        keep_every: steps between two records, of which the best is kept.

    Raises:
        ValueError: a number out of range.
    """

    num_tokens: int = 1
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 0.1
    seed: int = 0
    initial: str | None = None
    keep_every: int = 50

    def __post_init__(self) -> None:
        for name in ("num_tokens", "steps", "batch_size", "keep_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"expected a learning_rate above 0, got {self.learning_rate}")


class TemplateEncoder:
    """Text embeddings of templates whose {} is filled with vectors of the token table's space, not with words.

    Every vector counts as one token. With the table's rows of a word's tokens the result is that of the word.

    Args:
        family: its text encoder and tokenizer are used as they are.
        templates: T of them, each with one {} or several, which get the same K vectors.
        num_vectors: K.

    Raises:
        ValueError: a template without {}, or longer than the text encoder reads, which would cut it.
    """

    def __init__(self, family: TextToImageFamily, templates: Sequence[str], num_vectors: int):
        if not templates:
            raise ValueError("expected at least one template such as 'a {}', got none")
        self.pipeline, self.templates, self.num_vectors = family.pipeline, list(templates), num_vectors
        self.device = family.device
        weight = self.pipeline.text_encoder.get_input_embeddings().weight
        self.table: Tensor = weight.detach().to(self.device)  # [V, D]
        rows = [self._row(template) for template in self.templates]
        self.ids, self.slots = (torch.tensor(part, device=self.device) for part in zip(*rows, strict=True))  # [T, L]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, without the special ones."""
        return self.pipeline.tokenizer(text, add_special_tokens=False).input_ids

    def reads_as(self, text: str, token_ids: Sequence[int]) -> bool:
        """Whether the tokenizer turns every template, filled with the text, into these tokens in the place of {}."""
        filled = [template.replace(PLACE, text) for template in self.templates]
        ids = self.pipeline.tokenizer(filled, padding="max_length", truncation=True, return_tensors="pt").input_ids
        values = torch.tensor([*token_ids], device=self.device)
        return torch.equal(ids.to(self.device), torch.where(self.slots < 0, self.ids, values[self.slots.clamp_min(0)]))

    def __call__(self, vectors: Tensor, rows: Sequence[int]) -> Tensor:
        """Text embeddings [B, L, D] of the templates `rows`, from vectors [K, D]; gradients pass to the vectors."""
        slots = self.slots[list(rows)]
        encoder, ids = self.pipeline.text_encoder, self.ids[list(rows)]

        def fill(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return torch.where(slots[..., None] >= 0, vectors.to(output)[slots.clamp_min(0)], output)

        handle = encoder.get_input_embeddings().register_forward_hook(fill)
        try:
            return encoder(ids)[0]
        finally:
            handle.remove()

    def _row(self, template: str) -> tuple[list[int], list[int]]:
        """Padded token ids [L] of a template, and which vector goes where: its index, -1 for the template's own."""
        if PLACE not in template:
            raise ValueError(f"each template must hold {{}} where the concept goes; this one does not: {template!r}")
        tokenizer = self.pipeline.tokenizer
        first, *rest = (self.tokens(piece) for piece in template.split(PLACE))
        ids, slots = [tokenizer.bos_token_id, *first], [-1] * (1 + len(first))
        for piece in rest:
            # What stands in the place itself is overwritten; the start token is no end token, where poolers look.
            ids += [tokenizer.bos_token_id] * self.num_vectors + piece
            slots += [*range(self.num_vectors), *[-1] * len(piece)]
        padding = tokenizer.model_max_length - len(ids) - 1
        if padding < 0:
            raise ValueError(
                f"the template {template!r} comes to {len(ids) + 1} tokens with {self.num_vectors} in the place of "
                f"{{}}; the text encoder reads {tokenizer.model_max_length}: shorten it or pass a smaller num_tokens"
            )
        return [*ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding], [*slots, *[-1] * (1 + padding)]


class TargetLoss:
    """The model's own denoising loss on target latents under filled templates; no guidance, as in training.

    Args:
        family: of the model under attack, within `frozen_model`.
        encoder: of the templates.
        latents: targets [N, C, h, w].
        settings: its batch_size and seed.
    """

    def __init__(self, family: TextToImageFamily, encoder: TemplateEncoder, latents: Tensor, settings: AttackSettings):
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
        """The means over 16 of them each. It ends early, with fewer parts, where their sum exceeds that of a rival.

        This is a race: vectors with bad luck in the first parts are out, though all parts might put them ahead.
        """
        parts: list[float] = []
        for start in range(0, NUM_FIXED, 16):
            if rival and sum(parts) > sum(rival[: len(parts)]):
                break
            chosen, rows = (
                [place % count for place in range(start, start + 16)]
                for count in (len(self.latents), len(self.encoder.templates))
            )
            values = self._values(vectors, chosen, rows, seeded("prompt attack, fixed", start))
            parts.append(values.mean().item())
        return parts

    def _values(self, vectors: Tensor, chosen: list[int], rows: list[int], generator: Generator) -> Tensor:
        """The loss of each chosen target [B]; their timesteps are drawn from B equal parts of all, one each."""
        family, count = self.family, len(chosen)
        sample = self.latents[chosen].to(family.device)
        batch: Batch = {"sample": sample, "encoder_hidden_states": self.encoder(vectors, rows).to(sample.dtype)}
        places = torch.arange(count) + torch.rand(count, generator=generator)
        terms = (places * family.loss.num_terms / count).long().clamp_max(family.loss.num_terms - 1)
        noise = family.loss.sample_noise(batch, generator)
        return family.loss(family.module, batch, terms.to(family.device), noise)


@contextmanager
def frozen_model(family: TextToImageFamily) -> Iterator[None]:
    """Within the block UNet and text encoder take no gradient and draw no dropout; afterwards they are as before."""
    modules = (family.module, family.pipeline.text_encoder)
    parameters = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    parts = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for module in modules:
            module.eval()
        with (
            on_device(family.pipeline.text_encoder, family.device),
            autocast_forward(family.module, family.compute_dtype),
            torch.enable_grad(),  # whatever the caller's setting is
        ):
            yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        for part, training in parts:
            part.training = training


def check_attack(family: TextToImageFamily, latents: Tensor, concept_words: Sequence[str]) -> None:
    """Raise TypeError or ValueError for what cannot be attacked, before anything is computed."""
    if not isinstance(family, TextToImageFamily):
        raise TypeError(f"expected a text-to-image model, whose prompts are free text, got a {type(family).__name__}")
    if latents.dim() != 4 or tuple(latents.shape[1:]) != family.latent_shape or len(latents) == 0:
        expected = ", ".join(map(str, family.latent_shape))
        raise ValueError(f"expected target latents [N, {expected}], at least one, got {list(latents.shape)}")
    if not concept_words or not all(word.strip() for word in concept_words):
        raise ValueError(f"expected words for the concept, such as ['seven', '7'], got {list(concept_words)}")


def check_places(encoder: TemplateEncoder, word: str) -> None:
    """Raise ValueError for a template in which a word in the place of {} would be read as part of another."""
    for template in encoder.templates:
        text = template.replace(PLACE, word)
        pieces = [encoder.tokens(piece) for piece in template.split(PLACE)]
        apart = pieces[0] + [token for piece in pieces[1:] for token in encoder.tokens(word) + piece]
        if encoder.tokens(text) != apart:
            raise ValueError(f"expected {{}} to stand as a word of its own, got {template!r}: put spaces around it")
