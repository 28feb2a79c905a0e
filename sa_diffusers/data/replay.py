"""Which pictures are drawn for replay, Fisher and surrogate, and which of them are replayed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.concepts import Concept, Concepts
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import Request
from sa_diffusers.families import Family
from sa_diffusers.training.loop import infinite_indices


def spread(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts over the whole list: each once, in a random order, before any is taken again.

    Raises ValueError: there is none to take.
    """
    if count and not prompts:
        raise ValueError(f"expected prompts to choose {count} from, got none")
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(prompts), generator=seeded(seed, "spread", len(order))).tolist()
    return [prompts[index] for index in order[:count]]


def sample_requests(prompts: Sequence[str], count: int, empty_fraction: float, seed: int) -> list[Request]:
    """Requests over all conditions of the model, the empty prompt among them; they know nothing of a concept."""
    num_empty = round(count * empty_fraction)
    said = [""] * num_empty + spread(prompts, count - num_empty, seed)
    # Mixed, so that any stretch of the set (the Fisher takes its beginning) is spread like the whole.
    order = torch.randperm(count, generator=seeded(seed, "mix")).tolist()
    return [Request(Condition(said[i]), derive_seed(seed, "sample", i)) for i in order]


def needs_negative(prompt: str, concepts: Concepts, mode: str) -> bool:
    """Whether a replay prompt is drawn anew so that none of the concepts shows, or taught apart ("mixture").

    Samples of a prompt that leaves one open show it at its base rate and would teach it back.
    """
    if mode == "none" or concepts.named_in(prompt):
        return False
    return mode == "all" or any(one.left_open_by(prompt) for one in concepts)


def negative_requests(samples: SampleSet, concepts: Concepts, mode: str, seed: int) -> list[Request]:
    """The requests that take the place of samples which may show a concept, as many as there are of them.

    The negative prompt is one of the concepts that the prompt leaves open, at random. It keeps away no more than one:
    for the others left open a sibling that stays is named, one of a kind. With a concept more, most requests are what
    they were.
    """
    requests: list[Request] = []
    if mode == "mixture":
        return requests
    for i, prompt in enumerate(texts(samples.conditions)):
        if needs_negative(prompt, concepts, mode):
            open_ones = [one for one in concepts if one.left_open_by(prompt)]
            away = _one_of([one.said for one in open_ones or concepts], i)
            rest = [one for one in open_ones if one.said != away]
            said = ", ".join(filter(None, [prompt, *_kept_siblings(rest, concepts, i)]))
            requests.append(Request(Condition(said), derive_seed(seed, "negative", i), negative=Condition(away)))
    return requests


def _kept_siblings(open_ones: Sequence[Concept], concepts: Concepts, turn: int) -> list[str]:
    """For each kind among some concepts, a word of it that stays."""
    kinds = dict.fromkeys(concepts.siblings_of(one) for one in open_ones)
    return [_one_of(kept, turn) for kept in kinds if kept]


def _one_of(words: Sequence[str], turn: int) -> str:
    """A word for each turn, in about equal shares; without one of them, or with one more, only its turns move."""
    return min(words, key=lambda word: derive_seed(word, turn))


def kept_rows(prompts: Sequence[str], concepts: Concepts, mode: str) -> list[int]:
    """Which replay prompts keep their samples: those that neither name a concept nor are to be drawn anew.

    Raises:
        ValueError: none does, since every one names a concept, or, where nothing is drawn anew, leaves it open.
    """
    named = [concepts.named_in(prompt) for prompt in prompts]
    if all(named[i] for i, prompt in enumerate(prompts) if prompt.strip()) and any(named):
        raise ValueError(
            f"every replay prompt mentions {concepts.name!r}: there is nothing to keep; pass other --replay_prompts"
        )
    kept = [i for i, prompt in enumerate(prompts) if not named[i] and not needs_negative(prompt, concepts, mode)]
    if mode == "mixture" and not kept:
        raise ValueError(
            f"every replay prompt leaves {concepts.name!r} open, and replay_negative mixture draws none anew: there "
            "is nothing to keep; pass --replay_prompts that name its siblings, or --replay_negative open"
        )
    return kept


def select_replay(samples: SampleSet, concepts: Concepts, mode: str) -> SampleSet:
    """The samples to replay as they are. Raises ValueError as `kept_rows`."""
    return samples.take(kept_rows(texts(samples.conditions), concepts, mode))


class Replay:
    """Batches of replay samples, each under its own prompt, or shown to the model under others.

    Distilled, they are denoised as the frozen model denoises them, under any prompt that does not name a concept;
    those of the empty prompt, which guidance uses, under that. Prompts whose samples were drawn anew without the
    concepts keep these, and the noise as the target: the frozen model would teach these back at their base rate.

    Args:
        samples: what `select_replay` kept, and the samples drawn anew without the concepts.
        prompts: to choose from.
        mode: which prompts were drawn anew, as in `needs_negative`.
        distil: take the frozen model's predictions as targets; else the noise for all samples.
        dropout: share of the samples, with the noise as target, shown under the empty prompt or null class.
    """

    def __init__(
        self,
        samples: SampleSet,
        prompts: Sequence[str],
        concepts: Concepts,
        mode: str,
        distil: bool = True,
        dropout: float = 0.0,
    ):
        def negative(prompt: str) -> bool:
            return needs_negative(prompt, concepts, mode)

        self.samples, self.dropout = samples, dropout
        self.prompts = [p for p in prompts if not concepts.named_in(p) and not negative(p)]
        self.distilled = torch.tensor([not negative(prompt) for prompt in texts(samples.conditions)])
        if not (distil and self.prompts):
            self.distilled[:] = False

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step` of an endless walk over the samples; "distilled" [B] marks those with the frozen target."""
        indices, shown, distilled = self.shown(batch_size, step, seed)
        return family.batch(self.samples.take(indices).latents, shown) | {"distilled": distilled}

    def shown(self, batch_size: int, step: int, seed: int) -> tuple[list[int], list[Condition], Tensor]:
        """Of that batch: the samples' indices, the conditions they are shown under, and which have that target."""
        indices = infinite_indices(len(self.samples), batch_size, step, seed)
        own, distilled = texts([self.samples.conditions[index] for index in indices]), self.distilled[indices]
        dropped = torch.rand(batch_size, generator=seeded(seed, "dropout", step)) < self.dropout
        distilled = distilled & ~dropped
        drawn = torch.randint(max(1, len(self.prompts)), (batch_size,), generator=seeded(seed, "prompts", step))
        prompts = [
            self.prompts[index] if other and prompt.strip() else prompt
            for prompt, other, index in zip(own, distilled.tolist(), drawn.tolist(), strict=True)
        ]
        shown = [Condition("" if drop else p) for p, drop in zip(prompts, dropped.tolist(), strict=True)]
        return indices, shown, distilled


class DistilledSurrogate:
    """Batches under captions of the concepts, to be denoised as the frozen model denoises them under the same captions
    with surrogates in their places: distillation of one prompt into another, where the paper fits samples.

    Args:
        surrogate: samples of the surrogates; their prompts name the concepts, in turn.
        others: samples of anything, whose prompts do not count, since sampling from a concept's prompt passes through
            other states than its surrogate's; None: none.
        concepts: their surrogates are prompts.
    """

    def __init__(self, surrogate: SampleSet, others: SampleSet | None, concepts: Concepts):
        self.samples = surrogate if others is None else surrogate + others
        self.prompts, self.shares = texts(surrogate.conditions), surrogate.shares
        self.surrogate_prompt = concepts.replaced_in

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step` of an endless walk over the samples, captions of each concept in turn; "frozen" holds the
        conditions of the frozen model."""
        latents = self.samples.take(infinite_indices(len(self.samples), batch_size, step, seed)).latents
        generator = seeded(seed, "captions", step)
        drawn = torch.randint(len(self.prompts) // self.shares, (batch_size,), generator=generator) * self.shares
        whose = (torch.arange(batch_size) + step * batch_size) % self.shares
        prompts = [self.prompts[index] for index in (drawn + whose).tolist()]
        frozen = family.batch(latents, [Condition(self.surrogate_prompt(prompt)) for prompt in prompts])
        del frozen["sample"]
        marked = {"distilled": torch.ones(batch_size, dtype=torch.bool), "frozen": frozen}
        return family.batch(latents, list(map(Condition, prompts))) | marked


def concept_captions(
    templates: Sequence[Sequence[str]], concepts: Concepts, count: int, seed: int
) -> list[tuple[str, str, Concept]]:
    """`count` captions, the template of each and whose it is: concepts in turn, their phrasings in equal shares.

    Args:
        templates: of each concept, prompts with {} in its place.
    """
    found: list[Any] = [None] * count
    for k, (own, concept) in enumerate(zip(templates, concepts, strict=True)):
        places = range(k, count, len(concepts))
        for i, template in enumerate(spread(own, len(places), seed)):
            caption = template.replace("{}", concept.phrasings[i % len(concept.phrasings)])
            found[places[i]] = caption, template, concept
    return found


def surrogate_requests(
    captions: Sequence[tuple[str, str, Concept]], concepts: Concepts, seed: int, keep_concept: bool = False
) -> list[Request]:
    """Requests for surrogates in the concepts' places: the same sentence says something else, unless it is kept.

    That of a caption is the same, whatever other concepts there are.
    """
    said = [caption if keep_concept else filled(*rest, concepts) for caption, *rest in captions]
    turns = [(i // len(concepts), *filter(None, [i % len(concepts)])) for i in range(len(said))]
    return [Request(Condition(one), derive_seed(seed, "surrogate", *i)) for i, one in zip(turns, said, strict=True)]


def filled(template: str, concept: Concept, concepts: Concepts) -> str:
    """A template of a concept with its surrogate in its place, and others in those of other concepts."""
    return concepts.replaced_in(template).replace("{}", concept.surrogate)
