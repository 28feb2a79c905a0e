"""Erased Stable Diffusion (Gandikota et al., ICCV 2023), by itself and as a third term of Selective Amnesia."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.objectives import ESD, Frozen, Objective, SelectiveAmnesiaWithESD
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families.samplers import check_sampler, make_scheduler
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.methods.base import ALONE, Context, Method, Weights, make_ewc, register, training_loss
from sa_diffusers.methods.selective_amnesia import BACKWARD, SelectiveAmnesiaMethod
from sa_diffusers.methods.sources import distils_replay


@dataclass
class ESDOptions(Options):
    """Erased Stable Diffusion."""

    esd_guidance: float = option(1.0, "ESD's eta: how far its target is guided away from the concept.", least=0)
    esd_start_guidance: float = option(
        3.0, "Guidance towards the concept of the latents that ESD is trained on.", least=0
    )
    esd_inference_steps: int = option(50, "Noise levels of the sampler that draws them.", above=0)
    esd_authors_latents: bool = option(
        False, "Draw them as ESD's code does: two levels cleaner than the model is told, and none from pure noise."
    )
    esd_weight: float = option(1.0, "Of sa+esd, the weight of ESD's term beside Selective Amnesia's.", least=0)


class ESDMethod(Method):
    """Guidance away from the concept, learned in one scope, without any samples."""

    Options = ESDOptions
    requires = frozenset(("denoising", "guidance", "text"))
    favours = False

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        return {"frozen"}

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if options.esd_weight != ESDOptions().esd_weight:
            raise ValueError(f"{self.name} has no term beside ESD's to weigh it against; omit esd_weight")

    def check(self, context: Context) -> None:
        super().check(context)
        _check(context)

    def training_passes(self, options: Any) -> float:
        return 1 + BACKWARD + options.gradient_checkpointing + _esd_passes(options)

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        return _esd(context, frozen)

    def batches(self, context: Context) -> Callable[[int], Batch]:
        return lambda step: esd_batch(context, step)


class SelectiveAmnesiaWithESDMethod(SelectiveAmnesiaMethod):
    """Selective Amnesia, and guidance away from the concept wherever the model would still draw it."""

    Options = ESDOptions
    requires = frozenset(("denoising", "guidance"))
    takes_terms = False

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        return super().needs(options, concepts) | {"frozen"}

    def check(self, context: Context) -> None:
        super().check(context)
        _check(context)

    def training_passes(self, options: Any) -> float:
        own = 1 + BACKWARD + options.gradient_checkpointing + _esd_passes(options)
        return super().training_passes(options) + own

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        options = context.options
        target = frozen if distils_replay(options) or options.surrogate_target == "model" else None
        ewc = make_ewc(context, weights, frozen)
        return SelectiveAmnesiaWithESD(_esd(context, frozen), ewc, options.replay_weight, target, options.esd_weight)

    def batches(self, context: Context) -> Callable[[int], Batch]:
        others = super().batches(context)
        return lambda step: others(step) | {"esd": esd_batch(context, step)}


def _check(context: Context) -> None:
    objective = _esd(context, context.family.module)  # which refuses numbers that it cannot work with
    check_sampler(objective.scheduler, objective.num_levels, "esd_inference_steps")


def _esd(context: Context, frozen: Frozen) -> ESD:
    options, family = context.options, context.family
    return ESD(
        training_loss(context),
        frozen,
        make_scheduler("ddim", family.pipeline.scheduler),
        options.esd_guidance,
        options.esd_start_guidance,
        options.esd_inference_steps,
        options.esd_authors_latents,
    )


def _esd_passes(options: Any) -> float:
    return 2 + (options.esd_inference_steps - 1)  # two frozen ones, and on average half of the levels with guidance


def esd_batch(context: Context, step: int) -> Batch:
    """Phrasings of the concepts and the empty prompt, with latents of which only the shape counts."""
    options, family, each = context.options, context.family, [one.phrasings for one in context.concepts]
    size, turns = options.train_batch_size, range(math.lcm(*map(len, each)))
    phrasings = [own[turn % len(own)] for own in each for turn in turns]  # as many of every concept
    latents = torch.zeros(size, *family.latent_shape)
    chosen = torch.randint(len(phrasings), (size,), generator=seeded(options.seed, "esd prompts", step))
    named = [Condition(phrasings[index]) for index in chosen.tolist()]
    return {"concept": family.batch(latents, named), "empty": family.batch(latents, [Condition()] * size)}


def _alone(name: str, title: str, where: str, scope: str) -> ESDMethod:
    summary = f"guidance away from the concept, without any samples, in {where}"
    return ESDMethod(name, title, summary, **ALONE, train_scope=scope)


register(
    SelectiveAmnesiaWithESDMethod(
        "sa+esd", "Selective Amnesia with ESD's guidance", "its surrogate, replay and EWC, and ESD's term"
    ),
    _alone("esd-x", "ESD-x", "cross-attention", "xattn"),
    _alone("esd-x-strict", "ESD-x (keys and values only)", "its keys and values", "xattn-strict"),
    _alone("esd-u", "ESD-u", "all but cross-attention", "noxattn"),
)
