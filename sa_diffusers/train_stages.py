"""The stages that compute gradients: the Fisher, and the training that forgets."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from sa_diffusers.artifacts import atomic_path, fingerprint
from sa_diffusers.config import ForgetConfig
from sa_diffusers.data import SampleSet
from sa_diffusers.families import Family
from sa_diffusers.fisher import Fisher
from sa_diffusers.fisher_sums import estimate_sums
from sa_diffusers.loading import model_hash
from sa_diffusers.lora import WithoutLora, adapted_layers, add_lora
from sa_diffusers.objectives import (
    ElasticWeightConsolidation,
    GradientProjection,
    LowRankChange,
    LowRankEWC,
    NaiveForgetting,
    SelectiveAmnesia,
)
from sa_diffusers.precision import autocast_forward
from sa_diffusers.processes import process_state
from sa_diffusers.prompts import Concept, is_folder
from sa_diffusers.replay import Replay
from sa_diffusers.sampling import FreshNoise, FreshSamples, frozen_family, remove_parts
from sa_diffusers.seeding import derive_seed
from sa_diffusers.sharing import load_fisher, provenance
from sa_diffusers.stages import Stages
from sa_diffusers.training import DROPOUTS, TrainingConfig, train


def _identity(family: Family) -> dict:
    """What a Fisher belongs to."""
    return {
        "model_hash": model_hash(family.module),
        "reduction": family.loss.reduction,
        "num_terms": family.loss.num_terms,
        "prediction_type": family.loss.prediction_type,
    }


def given_fisher(family: Family, config: ForgetConfig) -> Fisher | None:
    """The Fisher that the configuration names, if it names and needs one. Raises FisherMismatch: another model's."""
    if not (config.fisher and config.ewc_lambda):
        return None
    fisher = load_fisher(config.fisher)
    fisher.check(**_identity(family), paper_quirks=", ".join(config.paper_quirks) or None)
    return fisher


def fisher_of(
    stages: Stages,
    family: Family,
    config: ForgetConfig,
    samples: SampleSet,
    samples_key: str,
    given: Fisher | None,
) -> tuple[Fisher, str]:
    """The Fisher that was given, or that of the whole module, whatever the scope; with its fingerprint."""
    if given is not None:
        stages.reused.append("fisher")
        return given, fingerprint(given.metadata)
    path = stages.output_dir / "fisher.safetensors"
    count = min(config.fisher_samples, len(samples))
    every_term = config.terms is None or family.loss.num_terms == 1
    metadata = _identity(family) | {
        "terms": "all" if every_term else config.fisher_terms,
        "num_evaluations": count * (family.loss.num_terms if every_term else 2 * config.terms),
        "seed": config.seed,
        "samples": samples_key,
    }
    if config.paper_quirks:
        metadata["paper_quirks"] = ", ".join(config.paper_quirks)
    # For people, not in the key: the same weights may come from another place.
    origin = provenance(config.model, config.revision) | {
        "estimator": "every timestep" if every_term else "two stratified draws, one scale a tensor",
        "dtype": "float32",
    }

    parts_dir = stages.output_dir / ".fisher_parts"

    def compute() -> Fisher:
        fisher = estimate_sums(family, config, samples, count, parts_dir).finish(metadata | origin)
        if process_state().is_main_process:
            with atomic_path(path) as temporary:
                fisher.save(temporary)
            error = fisher.metadata["total_relative_error"]
            if error is not None:
                print(
                    f"fisher: its sum over all weights is known to {error:.1%} (standard error over {count} samples)"
                )
        remove_parts(parts_dir)
        return fisher

    key = metadata | {"num_samples": count}
    fisher = stages.run("fisher", key, compute, lambda: Fisher.load(path), workspace=parts_dir)
    return fisher, fingerprint(key)


def forget_by_training(
    stages: Stages,
    family: Family,
    config: ForgetConfig,
    concept: Concept,
    surrogate: SampleSet,
    replay: SampleSet | None,
    prompts: list[str],
    fisher: Fisher | None,
    callback: Callable[[int, dict], bool | None] | None,
) -> list[dict]:
    """Minimise Selective Amnesia's objective over the scope's weights, in place; returns the history."""
    weights = _weights_to_train(family, config)
    frozen, size, seed = None, config.train_batch_size, config.seed
    distil = config.replay_target == "model" and "-" not in config.method
    if config.replay_weight and (distil or config.replay_prompt_dropout):
        if distil:  # else the model would be drawn away from its own predictions by what it drops
            frozen = frozen_module(family, config)
            switch_off_dropout(family.module)
        replay = Replay(replay, prompts, concept, config.replay_negative, distil, config.replay_prompt_dropout)
        family.prepare(replay.prompts if distil else [])
    objective = _objective(family, config, weights, fisher, frozen)
    surrogate, replay = _fresh(family, config, concept, surrogate, replay)

    def batches(step: int) -> dict:
        parts = {"surrogate": surrogate.batch(family, size, step, derive_seed(seed, "surrogate order"))}
        if config.replay_weight:
            parts["replay"] = replay.batch(family, size, step, derive_seed(seed, "replay order"))
        if config.method.endswith("alternating"):
            parts["step"] = torch.full((size,), step)
        return parts

    settings = TrainingConfig(**{name: getattr(config, name) for name in TrainingConfig.__dataclass_fields__})
    # Training's own forward passes autocast by accelerate, those of a frozen copy do not.
    with autocast_forward(frozen, family.compute_dtype) if isinstance(frozen, nn.Module) else nullcontext():
        return train(
            family.module,
            objective,
            batches,
            settings,
            seed=derive_seed(seed, "train"),
            checkpoint_dir=stages.output_dir / "checkpoints",
            callback=callback,
            callback_steps=config.track_steps,
            log_dir=stages.output_dir / "logs",
            description="forget",
        )


def _weights_to_train(family: Family, config: ForgetConfig) -> dict[str, nn.Parameter] | dict[str, LowRankChange]:
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


def _objective(
    family: Family,
    config: ForgetConfig,
    weights: dict[str, nn.Parameter] | dict[str, LowRankChange],
    fisher: Fisher | None,
    frozen: nn.Module | WithoutLora | None,
) -> SelectiveAmnesia:
    if "-" in config.method:
        when, mode = config.method.split("-")
        return GradientProjection(family.loss, list(weights.values()), mode, conflict_only=when == "pcgrad")
    ewc, dtype = None, getattr(torch, config.ewc_dtype)
    if fisher is not None and config.lora_rank:
        ewc = LowRankEWC(weights, fisher.tensors, config.ewc_lambda, dtype)
    elif fisher is not None:
        anchor = dict(frozen.named_parameters()) if isinstance(frozen, nn.Module) else None
        device = "cpu" if config.ewc_device == "cpu" else None
        ewc = ElasticWeightConsolidation(
            weights, fisher.tensors, config.ewc_lambda, anchor=anchor, fisher_dtype=dtype, device=device
        )
    method = NaiveForgetting if config.method == "naive" else SelectiveAmnesia
    return method(family.loss, ewc, config.replay_weight, frozen)


def _fresh(
    family: Family, config: ForgetConfig, concept: Concept, surrogate: SampleSet, replay: SampleSet | None
) -> tuple[SampleSet | FreshNoise | FreshSamples, SampleSet | FreshSamples | None]:
    """What training draws from: the sample sets, or sources that draw anew under their prompts every step."""
    in_pixels = family.latent_shape == (family.image_channels, family.resolution, family.resolution)
    if concept.surrogate == "noise" and in_pixels and not config.fresh_samples and config.method != "naive":
        surrogate = FreshNoise(concept.name)  # needs no encoder, so that every batch may have its own, as in the paper
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
