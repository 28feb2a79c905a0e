"""What training draws its batches from: sample sets, or sources that draw anew under their prompts every step."""

from typing import Any

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.replay import DistilledSurrogate, Replay
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import FreshNoise, FreshSamples, frozen_family
from sa_diffusers.methods.base import Context


def distils_replay(options: Any) -> bool:
    """Whether replay samples are denoised towards what the model before forgetting predicts."""
    return bool(options.replay_weight) and options.replay_target == "model"


def distils_surrogate(options: Any, concepts: Concepts) -> bool:
    """Whether surrogate samples are, too, as it predicts them under the surrogate's prompt."""
    return options.surrogate_target == "model" and concepts.surrogate_kind == "prompt"


class Sources:
    """The batches of Selective Amnesia: {"surrogate"} and, where there is replay, {"replayed"}.

    Args:
        own_samples: the samples under the concept's prompt are the model's own of the concept.
    """

    def __init__(self, context: Context, own_samples: bool = False):
        self.context, options = context, context.options
        self.surrogate = self._surrogate(own_samples)
        self.replay = self._replay() if options.replay_weight else None

    def __call__(self, step: int) -> dict[str, Batch]:
        options, family = self.context.options, self.context.family
        seeds = {name: derive_seed(options.seed, f"{name} order") for name in ("surrogate", "replay")}
        parts = {"surrogate": self.surrogate.batch(family, options.train_batch_size, step, seeds["surrogate"])}
        if self.replay is not None:
            parts["replayed"] = self.replay.batch(family, options.train_batch_size, step, seeds["replay"])
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
            family.prepare(list(map(Condition, replay.prompts)) if distils else [])
        return replay
