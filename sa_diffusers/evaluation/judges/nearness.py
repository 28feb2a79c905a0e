"""How near words are to a concept in a model's own eyes: no classifier, no labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sa_diffusers.core.batches import take, to
from sa_diffusers.core.concepts import Concept, Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import GRADIENT_SCALE
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.sampling import Request, SamplingSettings, draw_samples
from sa_diffusers.evaluation.judges.preference import PREFERENCE, PreferenceJudge
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import Family
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.models.quantization import gradients_of


COMPARED, LEVELS = 8, 6  # pictures of the concept that words are compared by, and levels of noise, each


@torch.no_grad()
def shortlist(family: Family, concept: str, words: Sequence[str], count: int) -> list[str]:
    """Of the words those that are nearest to the concept as the text encoders read them, and as many that tell most.

    Embeddings are compared without their mean: by direction, and by how far they are from it. An encoder that was
    trained on few words has them all far apart, and what says nothing near the mean.
    """
    if len(words) <= count:
        return list(words)
    with family.encoders_at_hand():
        read = [family.text_parts(family.encode_prompts([word]))["tokens"][0].mean(0) for word in (concept, *words)]
    embedded = torch.stack(read).float().cpu()
    own, *_ = embedded = embedded - embedded.mean(0)
    near = torch.cosine_similarity(embedded[1:], own[None]).argsort(descending=True, stable=True)
    telling = embedded[1:].norm(dim=1).argsort(descending=True, stable=True)
    chosen = dict.fromkeys(int(i) for pair in zip(near, telling, strict=True) for i in pair)
    return [words[i] for i in list(chosen)[:count]]


@dataclass
class Nearness:
    """A concept's own pictures, by which words are compared with it.

    Attributes:
        family: of the model as it is, which is only looked at.
        asked: captions of the concept, and each with {} in its place.
        latents: drawn for them; the first COMPARED are what words are compared by.
        settings: how pictures are drawn.
    """

    family: Family
    concept: Concept
    asked: Sequence[tuple[str, str]]
    settings: SamplingSettings
    seed: int

    def __post_init__(self) -> None:
        self.captions = [caption for caption, _ in self.asked]
        self.latents = self.drawn(self.captions)
        self.own = self.predictions(self.captions)

    def said(self, word: str) -> list[str]:
        """The captions with a word in the concept's place."""
        return [template.replace("{}", word) for _, template in self.asked]

    def drawn(self, prompts: Sequence[str]) -> Tensor:
        """Pictures, as latents [N, C, h, w], of equal seeds for any prompts."""
        conditions = list(map(Condition, prompts))
        requests = [Request(one, derive_seed(self.seed, "auto", i)) for i, one in enumerate(conditions)]
        return draw_samples(self.family, requests, self.settings, description="candidates").latents

    @torch.no_grad()
    def predictions(self, prompts: Sequence[str]) -> Tensor:
        """What is predicted of the concept's noised pictures under prompts, [LEVELS, N, D], where squares are nats."""
        (terms, weights), prompts = self.family.loss.divergence_terms(LEVELS), prompts[:COMPARED]
        rows = torch.arange(LEVELS * len(prompts)).split(self.settings.batch_size)
        parts = [self._predicted(prompts, terms, some).float().cpu().flatten(1) for some in rows]
        return torch.cat(parts).view(LEVELS, len(prompts), -1) * weights.sqrt().float()[:, None, None]

    def nats(self, word: str) -> float:
        """The divergence of what is drawn for a word in the concept's place from what is drawn for the concept."""
        return self.divergence(self.predictions(self.said(word)), self.own)

    @staticmethod
    def divergence(first: Tensor, second: Tensor) -> float:
        """Of two predictions, in nats a picture.

        Where a share b of a word's pictures shows the concept, the concept's are no further than log(1/b) from it.
        """
        return float((first - second).square().sum((0, 2)).mean())

    def taken_for_concept(self, word: str, latents: Tensor) -> float:
        """The share of a word's pictures that the model takes for the concept's, and not for the word's."""
        concepts = Concepts([replace(self.concept, surrogate=word)])
        judge = PreferenceJudge(self.family, concepts, favoured=True, batch_size=self.settings.batch_size)
        requests = [Request(Condition(caption), i) for i, caption in enumerate(self.captions)]
        judged = judge(self.family.decode(latents), PromptSet.of("asks", requests), None)
        return float(judged[PREFERENCE].mean())

    def price(self, word: str, fisher: Mapping[str, Tensor]) -> float:
        """What EWC would charge for a step down the gradient that closes the gap to a word, by the first order:

            sum F (eta g)^2  where  eta |g|^2 = L, the gap at the noise levels in turn, a picture each.

        Args:
            fisher: of each weight that is trained.
        """
        family, count = self.family, min(COMPARED, len(self.captions))
        terms = self.family.loss.divergence_terms(LEVELS)[0]
        rows = torch.arange(count) % LEVELS * count + torch.arange(count)
        with torch.no_grad():
            towards = self._predicted(self.said(word)[:count], terms, rows)
        dtype = family.compute_dtype or family.module.dtype
        with gradients_of(family.module, list(fisher), dtype) as weights, torch.enable_grad():
            gap = (self._predicted(self.captions[:count], terms, rows) - towards).square().flatten(1).mean(1).mean()
            gradients = torch.autograd.grad(GRADIENT_SCALE * gap, list(weights.values()))
        gradients = [gradient.double() / GRADIENT_SCALE for gradient in gradients]
        squares = {name: found.square().cpu() for name, found in zip(weights, gradients, strict=True)}
        charged = sum(float((fisher[name].cpu() * square).sum()) for name, square in squares.items())
        return charged * (float(gap.detach()) / float(sum(square.sum() for square in squares.values()))) ** 2

    def _predicted(self, prompts: Sequence[str], terms: Tensor, rows: Tensor) -> Tensor:
        """Of pictures under prompts at noise levels: row i is picture i % N at level i // N."""
        family, level, place = self.family, rows // len(prompts), rows % len(prompts)
        one = {"sample": self.latents[:1]}
        noise = torch.cat([family.loss.sample_noise(one, seeded(self.seed, "auto", i)) for i in rows.tolist()])
        batch = take(family.batch(self.latents[: len(prompts)], list(map(Condition, prompts))), place)
        at, noise = terms[level].to(family.device), noise.to(family.device)
        with autocast_forward(family.module, family.compute_dtype):
            return family.loss.predict(family.module, to(batch, family.device), at, noise)
