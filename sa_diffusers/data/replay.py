"""Which pictures are drawn for replay, Fisher and surrogate, and which of them are replayed."""

from collections.abc import Sequence

import torch

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.concepts import Concept, mentions
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import Request
from sa_diffusers.families import Family
from sa_diffusers.training.loop import infinite_indices


def spread(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts over the whole list: each once, in a random order, before any is taken again."""
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


def leaves_open(prompt: str, concept: Concept) -> bool:
    """Whether the model may draw the concept although the prompt does not ask for it.

    The empty prompt always does. Where the concept has siblings (another digit for a digit), so does every prompt that
    names none of them; samples of such prompts show the concept at its base rate and would teach it back.
    """
    if concept.named_in(prompt):
        return False
    return not prompt.strip() or bool(concept.siblings and not mentions(prompt, concept.siblings))


def needs_negative(prompt: str, concept: Concept, mode: str) -> bool:
    """Whether a replay prompt is drawn anew with the concept as negative prompt; or taught apart ("mixture")."""
    if concept.named_in(prompt):
        return False
    return mode == "all" or (mode in ("open", "mixture") and leaves_open(prompt, concept))


def negative_requests(samples: SampleSet, concept: Concept, mode: str, seed: int) -> list[Request]:
    """The requests that take the place of samples which may show the concept, as many as there are of them."""
    if mode == "mixture":
        return []
    named = Condition(", ".join(concept.phrasings))
    return [
        Request(Condition(prompt), derive_seed(seed, "negative", i), negative=named)
        for i, prompt in enumerate(texts(samples.conditions))
        if needs_negative(prompt, concept, mode)
    ]


def select_replay(samples: SampleSet, concept: Concept, mode: str) -> SampleSet:
    """The samples to replay as they are: neither naming the concept nor to be drawn anew.

    Raises:
        ValueError: nothing is left, since every prompt names the concept.
    """
    prompts = texts(samples.conditions)
    said = [prompt for prompt in prompts if prompt.strip()]
    if said and all(concept.named_in(prompt) for prompt in said):
        raise ValueError(
            f"every replay prompt mentions {concept.name!r}: there is nothing to keep; pass other --replay_prompts"
        )
    kept = [
        index
        for index, prompt in enumerate(prompts)
        if not concept.named_in(prompt) and not needs_negative(prompt, concept, mode)
    ]
    return samples.take(kept)


class Replay:
    """Batches of replay samples, each under its own prompt, or shown to the model under others.

    Distilled, they are denoised as the frozen model denoises them, under any prompt that does not name the concept;
    those of the empty prompt, which guidance uses, under that. Prompts whose samples were drawn anew without the
    concept keep these, and the noise as the target: the frozen model would teach the concept back at its base rate.

    Args:
        samples: what `select_replay` kept, and the samples drawn anew without the concept.
        prompts: to choose from.
        mode: which prompts were drawn anew, as in `needs_negative`.
        distil: take the frozen model's predictions as targets; else the noise for all samples.
        dropout: share of the samples, with the noise as target, shown under the empty prompt or null class.
    """

    def __init__(
        self,
        samples: SampleSet,
        prompts: Sequence[str],
        concept: Concept,
        mode: str,
        distil: bool = True,
        dropout: float = 0.0,
    ):
        def negative(prompt: str) -> bool:
            return needs_negative(prompt, concept, mode)

        self.samples, self.dropout = samples, dropout
        self.prompts = [p for p in prompts if not concept.named_in(p) and not negative(p)]
        self.distilled = torch.tensor([not negative(prompt) for prompt in texts(samples.conditions)])
        if not (distil and self.prompts):
            self.distilled[:] = False

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step` of an endless walk over the samples; "distilled" [B] marks those with the frozen target."""
        indices = infinite_indices(len(self.samples), batch_size, step, seed)
        chosen, distilled = self.samples.take(indices), self.distilled[indices]
        dropped = torch.rand(batch_size, generator=seeded(seed, "dropout", step)) < self.dropout
        distilled = distilled & ~dropped
        drawn = torch.randint(max(1, len(self.prompts)), (batch_size,), generator=seeded(seed, "prompts", step))
        prompts = [
            self.prompts[index] if other and own.strip() else own
            for own, other, index in zip(texts(chosen.conditions), distilled.tolist(), drawn.tolist(), strict=True)
        ]
        shown = [Condition("" if drop else p) for p, drop in zip(prompts, dropped.tolist(), strict=True)]
        return family.batch(chosen.latents, shown) | {"distilled": distilled}


class DistilledSurrogate:
    """Batches under captions of the concept, to be denoised as the frozen model denoises them under the same captions
    with the surrogate in the concept's place: distillation of one prompt into another, where the paper fits samples.

    Args:
        surrogate: samples of the surrogate; their prompts name the concept.
        others: samples of anything, whose prompts do not count, since sampling from the concept's prompt passes
            through other states than the surrogate's; None: none.
        concept: its surrogate is a prompt.
    """

    def __init__(self, surrogate: SampleSet, others: SampleSet | None, concept: Concept):
        self.samples = surrogate if others is None else surrogate + others
        self.prompts, self.concept = texts(surrogate.conditions), concept

    def surrogate_prompt(self, prompt: str) -> str:
        return self.concept.replaced_in(prompt, self.concept.surrogate)

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step` of an endless walk over the samples; "frozen" holds the conditions of the frozen model."""
        latents = self.samples.take(infinite_indices(len(self.samples), batch_size, step, seed)).latents
        drawn = torch.randint(len(self.prompts), (batch_size,), generator=seeded(seed, "captions", step)).tolist()
        prompts = [self.prompts[index] for index in drawn]
        frozen = family.batch(latents, [Condition(self.surrogate_prompt(prompt)) for prompt in prompts])
        del frozen["sample"]
        marked = {"distilled": torch.ones(batch_size, dtype=torch.bool), "frozen": frozen}
        return family.batch(latents, list(map(Condition, prompts))) | marked


def concept_captions(templates: Sequence[str], concept: Concept, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs (caption with a phrasing of the concept, the template it came from), phrasings in equal shares."""
    chosen = spread(templates, count, seed)
    return [(t.replace("{}", concept.phrasings[i % len(concept.phrasings)]), t) for i, t in enumerate(chosen)]


def surrogate_requests(
    pairs: Sequence[tuple[str, str]], concept: Concept, seed: int, keep_concept: bool = False
) -> list[Request]:
    """Requests for the surrogate in the concept's place: the same sentence says something else, unless it is kept."""
    said = [caption if keep_concept else template.replace("{}", concept.surrogate) for caption, template in pairs]
    return [Request(Condition(prompt), derive_seed(seed, "surrogate", i)) for i, prompt in enumerate(said)]
