"""What each method of forgetting trains, minimises and draws its batches from."""

import copy

import torch
from torch import nn

from sa_diffusers.core.fisher import Fisher
from sa_diffusers.core.objectives import (
    ESD,
    ElasticWeightConsolidation,
    GradientProjection,
    LowRankChange,
    LowRankEWC,
    NaiveForgetting,
    NestedBatch,
    Objective,
    SelectiveAmnesia,
    SelectiveAmnesiaWithESD,
)
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.prompts import Concept, is_folder
from sa_diffusers.data.replay import DistilledSurrogate
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import FreshNoise, FreshSamples, frozen_family
from sa_diffusers.families import Family
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.runs.options import ESD_METHODS, PROJECTIONS, ForgetConfig
from sa_diffusers.training.loop import DROPOUTS
from sa_diffusers.training.lora import WithoutLora, add_lora


def distils(config: ForgetConfig) -> bool:
    """Whether replay samples are denoised towards what the model before forgetting predicts."""
    return bool(config.replay_weight) and config.replay_target == "model" and config.method not in PROJECTIONS


def distils_surrogate(config: ForgetConfig, concept: Concept) -> bool:
    """Whether surrogate samples are, too, as it predicts them under the surrogate's prompt."""
    return config.surrogate_target == "model" and concept.surrogate != "noise" and not is_folder(concept.surrogate)


def needs_frozen(config: ForgetConfig) -> bool:
    """Whether the model before forgetting is called in training, or may be."""
    return (
        distils(config)
        or config.surrogate_target == "model"
        or config.method in ESD_METHODS
        or config.method == "sa+esd"
    )


def weights_to_train(family: Family, config: ForgetConfig) -> dict[str, nn.Parameter] | dict[str, LowRankChange]:
    """The scope's weights, or the low-rank changes of them, by name; nothing else requires a gradient then."""
    family.module.requires_grad_(False)
    if config.lora_rank:
        layers = adapted_layers(family.module, config.train_scope, config.lora_targets)
        return add_lora(family.module, layers, config.lora_rank, config.lora_alpha or config.lora_rank, config.seed)
    weights = family.trainable(config.train_scope)
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def frozen_module(family: Family, config: ForgetConfig) -> nn.Module | WithoutLora:
    """The model before forgetting, to be called like it: a copy, or where adapters are trained the model without."""
    if config.lora_rank:
        return WithoutLora(family.module)
    frozen = copy.deepcopy(family.module).eval().requires_grad_(False)
    if config.compile_backend:
        frozen.compile(backend=config.compile_backend)
    return frozen


def switch_off_dropout(module: nn.Module) -> None:
    """For good: a model that has forgotten is saved with its configuration, which knows its dropout."""
    for part in module.modules():
        if isinstance(part, DROPOUTS):
            part.p = 0.0


def make_objective(
    family: Family,
    config: ForgetConfig,
    weights: dict[str, nn.Parameter] | dict[str, LowRankChange],
    fisher: Fisher | None,
    frozen: nn.Module | WithoutLora | None,
) -> Objective:
    """What the configuration's method minimises; `weights` as `weights_to_train` gave them."""
    if config.method in ESD_METHODS:
        return _esd(family, config, frozen)
    if config.method in PROJECTIONS:
        when, mode = config.method.split("-")
        return GradientProjection(family.loss, list(weights.values()), mode, conflict_only=when == "pcgrad")
    ewc, dtype, device = None, getattr(torch, config.ewc_dtype), "cpu" if config.ewc_device == "cpu" else None
    if fisher is not None and config.lora_rank:
        ewc = LowRankEWC(weights, fisher.tensors, config.ewc_lambda, dtype, device)
    elif fisher is not None:
        anchor = dict(frozen.named_parameters()) if isinstance(frozen, nn.Module) else None
        ewc = ElasticWeightConsolidation(
            weights, fisher.tensors, config.ewc_lambda, anchor=anchor, fisher_dtype=dtype, device=device
        )
    if config.method == "sa+esd":
        target = frozen if distils(config) or config.surrogate_target == "model" else None
        return SelectiveAmnesiaWithESD(
            _esd(family, config, frozen), ewc, config.replay_weight, target, config.esd_weight
        )
    method = NaiveForgetting if config.method == "naive" else SelectiveAmnesia
    return method(family.loss, ewc, config.replay_weight, frozen)


def _esd(family: Family, config: ForgetConfig, frozen: nn.Module | WithoutLora) -> ESD:
    return ESD(
        family.loss,
        frozen,
        make_scheduler("ddim", family.pipeline.scheduler),
        config.esd_guidance,
        config.esd_start_guidance,
        config.esd_inference_steps,
        config.esd_authors_latents,
    )


def esd_batch(family: Family, concept: Concept, batch_size: int, step: int, seed: int) -> NestedBatch:
    """Phrasings of the concept and the empty prompt, with latents of which only the shape counts."""
    latents = torch.zeros(batch_size, *family.latent_shape)
    chosen = torch.randint(len(concept.phrasings), (batch_size,), generator=seeded(seed, "esd prompts", step))
    prompts = [concept.phrasings[index] for index in chosen.tolist()]
    return {"concept": family.batch(latents, prompts), "empty": family.batch(latents, [""] * batch_size)}


def training_data(
    family: Family,
    config: ForgetConfig,
    concept: Concept,
    surrogate: SampleSet,
    replay: SampleSet | None,
    samples: SampleSet | None,
) -> tuple[SampleSet | DistilledSurrogate | FreshNoise | FreshSamples, SampleSet | FreshSamples | None]:
    """What training draws from: the sample sets, or sources that draw anew under their prompts every step."""
    in_pixels = family.latent_shape == (family.image_channels, family.resolution, family.resolution)
    if concept.surrogate == "noise" and in_pixels and not config.fresh_samples and config.method != "naive":
        surrogate = FreshNoise(concept.name)  # needs no encoder, so that every batch may have its own, as in the paper
    if distils_surrogate(config, concept):
        surrogate = DistilledSurrogate(surrogate, samples, concept)
        family.prepare([surrogate.surrogate_prompt(prompt) for prompt in surrogate.prompts])
    if not config.fresh_samples:
        return surrogate, replay
    drawn = config.latents == "drawn"
    frozen = frozen_family(family)
    if replay is not None:
        replay = FreshSamples(frozen, sorted(set(replay.prompts)), with_latents=drawn)
    if config.method == "naive":
        return FreshSamples(frozen, [concept.name], with_latents=drawn), replay
    if concept.surrogate == "noise":
        return FreshNoise(concept.name, with_latents=drawn), replay
    if is_folder(concept.surrogate):
        return surrogate, replay
    return FreshSamples(frozen, [concept.surrogate], shown_as=concept.name, with_latents=drawn), replay
