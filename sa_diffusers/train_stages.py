"""The stages that compute gradients: the Fisher, and the training that forgets."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from sa_diffusers.artifacts import atomic_path, fingerprint
from sa_diffusers.config import ForgetConfig
from sa_diffusers.data import SampleSet
from sa_diffusers.families import Family
from sa_diffusers.fisher import Fisher
from sa_diffusers.fisher_sums import estimate_sums
from sa_diffusers.loading import model_hash
from sa_diffusers.objectives import (
    ElasticWeightConsolidation,
    GradientProjection,
    NaiveForgetting,
    SelectiveAmnesia,
)
from sa_diffusers.processes import process_state
from sa_diffusers.prompts import Concept, is_folder
from sa_diffusers.replay import Replay
from sa_diffusers.sampling import FreshNoise, FreshSamples, frozen_family, remove_parts
from sa_diffusers.seeding import derive_seed
from sa_diffusers.stages import Stages
from sa_diffusers.training import DROPOUTS, TrainingConfig, train


def fisher_of(
    stages: Stages, family: Family, config: ForgetConfig, samples: SampleSet, samples_key: str
) -> tuple[Fisher, str]:
    """The Fisher of the whole module, whatever the scope, so that any run may reuse it; with its fingerprint."""
    identity = {
        "model_hash": model_hash(family.module),
        "reduction": family.loss.reduction,
        "num_terms": family.loss.num_terms,
        "prediction_type": family.loss.prediction_type,
    }
    if config.fisher:
        fisher = Fisher.load(config.fisher)
        fisher.check(**identity, paper_quirks=", ".join(config.paper_quirks) or None)
        stages.reused.append("fisher")
        return fisher, fingerprint(fisher.metadata)
    path = stages.output_dir / "fisher.safetensors"
    count = min(config.fisher_samples, len(samples))
    every_term = config.terms is None or family.loss.num_terms == 1
    metadata = identity | {
        "terms": "all" if every_term else config.fisher_terms,
        "num_evaluations": count * (family.loss.num_terms if every_term else 2 * config.terms),
        "seed": config.seed,
        "samples": samples_key,
    }
    if config.paper_quirks:
        metadata["paper_quirks"] = ", ".join(config.paper_quirks)

    parts_dir = stages.output_dir / ".fisher_parts"

    def compute() -> Fisher:
        fisher = estimate_sums(family, config, samples, count, parts_dir).finish(metadata)
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
    family.module.requires_grad_(False)
    trained = family.trainable(config.train_scope)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    frozen, dropout = None, config.replay_prompt_dropout
    distil = config.replay_target == "model" and "-" not in config.method
    if config.replay_weight and (distil or dropout):
        frozen = copy.deepcopy(family.module).eval().requires_grad_(False) if distil else None
        if distil:  # else the model would be drawn away from its own predictions by what it drops
            switch_off_dropout(family.module)
        replay = Replay(replay, prompts, concept, config.replay_negative, distil, dropout)
    objective = _objective(family, config, trained, fisher, frozen)
    size, seed = config.train_batch_size, config.seed

    surrogate, replay = _fresh(family, config, concept, surrogate, replay)

    def batches(step: int) -> dict:
        parts = {"surrogate": surrogate.batch(family, size, step, derive_seed(seed, "surrogate order"))}
        if config.replay_weight:
            parts["replay"] = replay.batch(family, size, step, derive_seed(seed, "replay order"))
        if config.method.endswith("alternating"):
            parts["step"] = torch.full((size,), step)
        return parts

    settings = TrainingConfig(**{name: getattr(config, name) for name in TrainingConfig.__dataclass_fields__})
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


def switch_off_dropout(module: nn.Module) -> None:
    """For good: a model that has forgotten is saved with its configuration, which knows its dropout."""
    for part in module.modules():
        if isinstance(part, DROPOUTS):
            part.p = 0.0


def _objective(
    family: Family,
    config: ForgetConfig,
    trained: dict[str, nn.Parameter],
    fisher: Fisher | None,
    frozen: nn.Module | None,
) -> SelectiveAmnesia:
    if "-" in config.method:
        when, mode = config.method.split("-")
        return GradientProjection(family.loss, list(trained.values()), mode, conflict_only=when == "pcgrad")
    ewc = None if fisher is None else ElasticWeightConsolidation(trained, fisher.tensors, config.ewc_lambda)
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
