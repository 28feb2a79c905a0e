"""What training draws its batches from: sample sets, or sources that draw anew under their prompts every step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch, conditions_of, map_tensors
from sa_diffusers.core.concepts import Concept, Concepts
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.replay import DistilledSurrogate, Replay, spread
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import FreshNoise, FreshSamples, frozen_family
from sa_diffusers.families import Family
from sa_diffusers.families.text_to_image.caption_encoder import CaptionEncoder
from sa_diffusers.families.text_to_image.template_encoder import PLACE, TemplateEncoder, fits
from sa_diffusers.methods.base import Context
from sa_diffusers.training.loop import infinite_indices


START_NOISE = 0.5  # of an adversary's start, as a share of the root mean square of the token table
OTHERS = 16  # prompts that stand in for siblings


def distils_replay(options: Any) -> bool:
    """Whether replay samples are denoised towards what the model before forgetting predicts."""
    return bool(options.replay_weight) and options.replay_target == "model"


def distils_surrogate(options: Any, concepts: Concepts) -> bool:
    """Whether surrogate samples are also as it predicts them under the surrogate's prompt."""
    return options.surrogate_target == "model" and concepts.surrogate_kind == "prompt"


def mixes(options: Any) -> bool:
    """Whether prompts that leave the concept open are taught what is predicted without its share."""
    return bool(options.replay_weight) and options.replay_negative == "mixture"


def open_rows(options: Any) -> int:
    """How many of these an optimiser step takes."""
    return max(1, options.train_batch_size // 4)


class Sources:
    """The batches of Selective Amnesia: {"surrogate"} and, where there are such, {"replayed", "adversary", "open"}.

    Args:
        own_samples: the samples under the concept's prompt are the model's own of the concept.
    """

    def __init__(self, context: Context, own_samples: bool = False):
        self.context, options = context, context.options
        self.seeds = {name: derive_seed(options.seed, f"{name} order") for name in ("surrogate", "replay")}
        self.surrogate = self._surrogate(own_samples)
        self.replay = self._replay() if options.replay_weight else None
        self.adversary = AdversarySource(context) if options.robust_weight else None
        self.open = OpenSource(context) if mixes(options) else None

    def __call__(self, step: int) -> dict[str, Batch]:
        options, family = self.context.options, self.context.family
        parts = {"surrogate": self.surrogate.batch(family, options.train_batch_size, step, self.seeds["surrogate"])}
        if self.replay is not None:
            parts["replayed"] = self.replay.batch(family, options.train_batch_size, step, self.seeds["replay"])
        if self.adversary is not None and step % options.robust_every == 0:
            parts["adversary"] = self.adversary.batch(step // options.robust_every)
        if self.open is not None:
            parts["open"] = self.open.batch(step)
        return parts

    def _surrogate(self, own_samples: bool) -> SampleSet | DistilledSurrogate | FreshNoise | FreshSamples:
        context = self.context
        options, concepts, family = context.options, context.concepts, context.family
        drawn, named = options.latents == "drawn", [Condition(one.name) for one in concepts]
        if options.fresh_samples and own_samples:
            return FreshSamples(frozen_family(family), named, with_latents=drawn)
        if options.fresh_samples and concepts.surrogate_kind == "prompt":
            instead = [Condition(one.surrogate) for one in concepts]
            return FreshSamples(frozen_family(family), instead, named, drawn)
        in_pixels = family.latent_shape == (family.image_channels, family.resolution, family.resolution)
        if concepts.surrogate_kind == "noise" and not own_samples and (options.fresh_samples or in_pixels):
            # It needs no encoder, so that every batch may have its own, as in the paper.
            return FreshNoise(named, with_latents=drawn)
        surrogate = context.value("surrogate")
        if distils_surrogate(options, concepts):
            surrogate = DistilledSurrogate(surrogate, context.value("samples"), concepts)
            family.prepare([Condition(surrogate.surrogate_prompt(prompt)) for prompt in surrogate.prompts])
        return surrogate

    def _replay(self) -> SampleSet | Replay | FreshSamples:
        context, options, family = self.context, self.context.options, self.context.family
        replay, distils = context.value("replay_samples"), distils_replay(options)
        if options.fresh_samples:
            drawn = options.latents == "drawn"
            kept = map(Condition, sorted(set(texts(replay.conditions))))
            return FreshSamples(frozen_family(family), list(kept), with_latents=drawn)
        if distils or options.replay_prompt_dropout:
            replay = Replay(
                replay,
                context.prompts,
                context.concepts,
                options.replay_negative,
                distils,
                options.replay_prompt_dropout,
            )
            if distils:
                steps, size = range(options.num_train_steps), options.train_batch_size
                walk = (replay.shown(size, step, self.seeds["replay"])[1] for step in steps)
                family.prepare([condition for shown in walk for condition in shown])
        return replay


def fitting(family: Family, concept: Concept, captions: Sequence[str], options: Any) -> list[int]:
    """Indices of the captions of the concept that have room for an adversary's vectors, where it seeks such."""
    if options.robust_embedding:
        return list(range(len(captions)))
    templates = adversarial_templates(concept, captions, options)
    return [i for i, t in enumerate(templates) if fits(family, t, options.robust_tokens, concept.name)]


def adversarial_templates(concept: Concept, captions: Sequence[str], options: Any) -> list[str]:
    """The captions with {} in the concept's place, or after its name."""
    place = f"{concept.name} {PLACE}" if options.robust_slots else PLACE
    return [concept.replaced_in(caption, place) for caption in captions]


def adversary_encoder(context: Context) -> TemplateEncoder | CaptionEncoder:
    """Of one template, or caption, for each of the concept's own pictures that fits."""
    options, captions = context.options, texts(context.value("concept_samples").conditions)
    kept = [captions[index] for index in fitting(context.family, context.concepts[0], captions, options)]
    if options.robust_embedding:
        return CaptionEncoder(context.family, kept)
    templates = adversarial_templates(context.concepts[0], kept, options)
    return TemplateEncoder(context.family, templates, options.robust_tokens)


class AdversarySource:
    """The concept's own pictures, in groups with what `Adversary` starts at and takes besides.

    Its starts are the concept's name and noise (half), siblings where there are any, and tokens at random; of whole
    embeddings the captions' own.

    Raises:
        ValueError: no caption has room for the vectors.
    """

    def __init__(self, context: Context):
        self.context, samples = context, context.value("concept_samples")
        chosen = fitting(context.family, context.concepts[0], texts(samples.conditions), context.options)
        if not chosen:
            raise ValueError("robust_tokens: no picture's caption has room for them; pass fewer")
        self.samples = samples.take(chosen)
        self.encoder = adversary_encoder(context)
        captions = texts(self.samples.conditions)
        self.instead = [context.concepts.replaced_in(caption) for caption in captions]
        context.family.prepare([*self.samples.conditions, *map(Condition, self.instead)])

    def batch(self, turn: int) -> Batch:
        """The batch of a search."""
        options, family = self.context.options, self.context.family
        seed = derive_seed(options.seed, "adversary order")
        indices = infinite_indices(len(self.samples), options.robust_samples, turn, seed)
        chosen = self.samples.take(indices)
        own = family.batch(chosen.latents, chosen.conditions)
        instead = family.batch(chosen.latents, [Condition(self.instead[index]) for index in indices])
        rows = {"sample": own["sample"], "asked": conditions_of(own), "frozen": conditions_of(instead)}
        grouped = map_tensors(
            rows | {"rows": torch.tensor(indices)}, lambda t: t.unflatten(0, (options.robust_groups, -1))
        )
        generator = seeded(options.seed, "adversary start", turn)
        return grouped | {"start": torch.stack([self._start(generator) for _ in range(options.robust_groups)])}

    def _start(self, generator: Generator) -> Tensor:
        if isinstance(self.encoder, CaptionEncoder):
            return self.encoder.start()
        concept, kind = self.context.concepts[0], float(torch.rand((), generator=generator))
        if kind < 0.5:
            word = self.encoder.start(concept.name).float().cpu()
            return word + START_NOISE * self.encoder.scale * torch.randn(word.shape, generator=generator)
        if kind < 0.75 and concept.siblings:
            chosen = int(torch.randint(len(concept.siblings), (), generator=generator))
            return self.encoder.start(concept.siblings[chosen]).float().cpu()
        return self.encoder.random(generator).float().cpu()


def others_of(context: Context) -> list[str]:
    """What the concepts' share is estimated among: siblings that stay, or where none are known other prompts."""
    kept = [prompt for prompt in context.prompts if not context.concepts.named_in(prompt)]
    siblings = context.concepts.siblings_of(context.concepts[0])
    return list(siblings) or spread(kept, min(OTHERS, len(kept)), context.options.seed)


class OpenSource:
    """Samples under prompts that leave the concepts open, each also asked for with these, and with others.

    Raises:
        ValueError: there are no such samples.
    """

    def __init__(self, context: Context):
        self.context, samples = context, context.value("samples")
        self.names, concepts = [one.name for one in context.concepts], context.concepts
        chosen = [i for i, prompt in enumerate(texts(samples.conditions)) if concepts.left_open_by(prompt)]
        if not chosen:
            raise ValueError(
                "replay_negative mixture: no sample's prompt leaves the concept open; pass other --samples"
            )
        self.samples, self.others = samples.take(chosen), others_of(context)
        walk = [self._asked(step) for step in range(context.options.num_train_steps)]
        asked = dict.fromkeys(condition for _, step in walk for condition in step)
        context.family.prepare([*self.samples.conditions, *asked])

    def _asked(self, step: int) -> tuple[list[int], list[Condition]]:
        """Which samples a step shows, and what each is asked with, word by word."""
        options = self.context.options
        count, seed = open_rows(options), derive_seed(options.seed, "open order")
        indices = infinite_indices(len(self.samples), count, step, seed)
        order = torch.randperm(len(self.others), generator=seeded(options.seed, "open words", step))
        words = [*self.names, *(self.others[i] for i in order[: options.open_siblings].tolist())]
        prompts = (self.samples.conditions[index].text for index in indices)
        return indices, [Condition(asked_with(prompt, word)) for prompt in prompts for word in words]

    def batch(self, step: int) -> Batch:
        """The batch of an optimiser step."""
        family, (indices, asked) = self.context.family, self._asked(step)
        chosen, count = self.samples.take(indices), len(indices)
        latents = chosen.latents.repeat_interleave(len(asked) // count, 0)
        conditions = conditions_of(family.batch(latents, asked))
        data = family.batch(chosen.latents, chosen.conditions)
        return data | {"asked": map_tensors(conditions, lambda t: t.unflatten(0, (count, -1)))}


def asked_with(prompt: str, word: str) -> str:
    """What asks for a word as well."""
    return f"{prompt}, {word}" if prompt.strip() else word
