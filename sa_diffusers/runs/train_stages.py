"""The stages that compute gradients: the Fisher, and the training that forgets."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from sa_diffusers.core.fisher import Fisher
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.prompts import Concept, mentions
from sa_diffusers.data.replay import Replay, spread
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import remove_parts
from sa_diffusers.data.sharing import load_fisher
from sa_diffusers.families import Family, get_family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.hub import provenance
from sa_diffusers.io.loading import model_hash
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Stages
from sa_diffusers.methods.building import (
    distils,
    esd_batch,
    frozen_module,
    make_objective,
    needs_frozen,
    switch_off_dropout,
    training_data,
    weights_to_train,
)
from sa_diffusers.methods.edit_start import start_from_edit
from sa_diffusers.methods.uce import ClosedFormEdit, concept_edits, edit_of_prompts
from sa_diffusers.models.precision import autocast_forward, release
from sa_diffusers.pipelines import SafeGuidancePipeline
from sa_diffusers.runs.fisher_sums import estimate_sums
from sa_diffusers.runs.options import ESD_METHODS, SLD_METHODS, ForgetConfig
from sa_diffusers.training.loop import TrainingConfig, train


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
        # As one that was loaded: EWC takes what it needs to the device, in its own precision.
        fisher.tensors = {name: tensor.cpu() for name, tensor in fisher.tensors.items()}
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


def edit_of(
    stages: Stages,
    family: Family,
    config: ForgetConfig,
    concept: Concept,
    prompts: list[str],
    templates: list[str],
    hashes: dict[str, str],
) -> tuple[ClosedFormEdit | None, str]:
    """The closed-form edit that the method is, or that training starts at, if either is so; with its fingerprint.

    Nothing is changed yet: it is the first stage, since it may find that it does not fit the model.
    """
    if config.method != "uce" and config.start != "edit":
        return None, "none"
    path = stages.output_dir / "edit.safetensors"
    weights = {name: getattr(config, f"uce_{name}") for name in ("erase_scale", "preserve_scale", "regularization")}
    kept = [prompt for prompt in prompts if not mentions(prompt, concept.phrasings)]
    texts = {
        "edits": concept_edits(concept, templates),
        "preserve": ["", *spread(kept, min(config.uce_preserve_prompts, len(kept)), config.seed)],
    }
    key = {"model": hashes, "weights": weights, "prompts": fingerprint(texts)}

    def compute() -> ClosedFormEdit:
        edit = edit_of_prompts(family, **texts, **weights)
        edit.check(family.module)
        if process_state().is_main_process:
            with atomic_path(path) as temporary:
                edit.save(temporary)
        return edit

    return stages.run("edit", key, compute, lambda: ClosedFormEdit.load(path), counts_as="train"), fingerprint(key)


def safely_guided(family: Family, config: ForgetConfig, concept: Concept) -> Family:
    """The same model in a pipeline that is led away from the concept while it draws."""
    pipeline = SafeGuidancePipeline(
        **family.pipeline.components,
        requires_safety_checker=family.pipeline.config.requires_safety_checker,
        safety_concept=", ".join(concept.phrasings),
        safety_level=SLD_METHODS[config.method],
    )
    return get_family(pipeline, sampler=config.sampler, compute_dtype=family.compute_dtype)


def forget_by_training(
    stages: Stages,
    family: Family,
    config: ForgetConfig,
    concept: Concept,
    surrogate: SampleSet | None,
    replay: SampleSet | None,
    samples: SampleSet | None,
    prompts: list[str],
    fisher: Fisher | None,
    start: ClosedFormEdit | None,
    callback: Callable[[int, dict], bool | None] | None,
) -> list[dict]:
    """Minimise the method's objective over the scope's weights, in place; returns the history."""
    weights = weights_to_train(family, config)
    frozen, size, seed = None, config.train_batch_size, config.seed
    if needs_frozen(config):  # a model that drops would be drawn away from its own predictions by that
        frozen = frozen_module(family, config)
        switch_off_dropout(family.module)
    if config.replay_weight and (distils(config) or config.replay_prompt_dropout):
        dropout = config.replay_prompt_dropout
        replay = Replay(replay, prompts, concept, config.replay_negative, distils(config), dropout)
        family.prepare(replay.prompts if distils(config) else [])
    objective = make_objective(family, config, weights, fisher, frozen)
    if start is not None:  # only now: EWC's anchor is the model as it was
        start_from_edit(family.module, weights, start)
    surrogate, replay = training_data(family, config, concept, surrogate, replay, samples)

    def batches(step: int) -> dict:
        if config.method in ESD_METHODS:
            return esd_batch(family, concept, size, step, seed)
        parts = {"surrogate": surrogate.batch(family, size, step, derive_seed(seed, "surrogate order"))}
        if config.replay_weight:
            parts["replay"] = replay.batch(family, size, step, derive_seed(seed, "replay order"))
        if config.method.endswith("alternating"):
            parts["step"] = torch.full((size,), step)
        if config.method == "sa+esd":
            parts["esd"] = esd_batch(family, concept, size, step, seed)
        return parts

    settings = TrainingConfig(**{name: getattr(config, name) for name in TrainingConfig.__dataclass_fields__})
    # Training's own forward passes autocast by accelerate, those of a frozen copy do not.
    copied = isinstance(frozen, nn.Module)
    try:
        with autocast_forward(frozen, family.compute_dtype) if copied else nullcontext():
            return train(
                family.module,
                objective,
                batches,
                settings,
                seed=derive_seed(seed, "train"),
                checkpoint_dir=stages.output_dir / "checkpoints",
                callback=callback,
                callback_steps=config.callback_steps,
                log_dir=stages.output_dir / "logs",
                description="forget",
            )
    finally:
        if copied:
            release(frozen)
