"""The stages of a forgetting run. Each leaves files, and is reused when those were made with the same key."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from sa_diffusers.artifacts import Stage, StageMismatch, atomic_path, fingerprint, write_json
from sa_diffusers.config import ForgetConfig
from sa_diffusers.data import SampleSet, image_paths, load_image, surrogate_from_images, uniform_noise
from sa_diffusers.evaluation.before_after import contact_sheet
from sa_diffusers.families import Family
from sa_diffusers.fisher import Fisher
from sa_diffusers.fisher_sums import estimate_sums
from sa_diffusers.loading import model_hash
from sa_diffusers.objectives import ElasticWeightConsolidation, SelectiveAmnesia
from sa_diffusers.processes import process_state
from sa_diffusers.prompts import Concept, is_folder
from sa_diffusers.replay import concept_captions, negative_requests, sample_requests, select_replay, surrogate_requests
from sa_diffusers.sampling import SamplingSettings, draw_samples, remove_parts
from sa_diffusers.seeding import derive_seed
from sa_diffusers.training import TrainingConfig, train


Result = TypeVar("Result")


class Stages:
    """Runs stages in one output folder and keeps account of what they took and what was reused."""

    def __init__(self, output_dir: Path, overwrite: bool = False):
        self.output_dir, self.overwrite = output_dir, overwrite
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []

    def run(
        self,
        name: str,
        key: dict,
        compute: Callable[[], Result],
        load: Callable[[], Result],
        counts_as: str | None = None,
        workspace: Path | None = None,
    ) -> Result:
        """The stage's result: loaded if the folder holds it under the same key, else computed by all processes.

        Args:
            compute: leaves its files and returns the result; the marker is written after it.
            load: reads these files.
            counts_as: the name under which the seconds are added up; by default the stage's.
            workspace: folder of what is unfinished; emptied first if another key left it.
        """
        state = process_state()
        stage = Stage(self.output_dir, name, key)
        done = self._is_done(stage)
        state.wait_for_everyone()
        if done:
            result, elapsed = load(), stage.seconds
            self.reused.append(name)
        else:
            if state.is_main_process:
                stage.clear()  # the old marker must not vouch for new files if this is interrupted
                if workspace is not None:
                    _claim_workspace(workspace, stage.fingerprint)
            state.wait_for_everyone()
            start = time.perf_counter()
            result = compute()
            state.wait_for_everyone()
            elapsed = time.perf_counter() - start
            if state.is_main_process:
                stage.finish(elapsed)
            state.wait_for_everyone()
        counts_as = counts_as or name
        self.seconds[counts_as] = self.seconds.get(counts_as, 0.0) + elapsed
        return result

    def _is_done(self, stage: Stage) -> bool:
        try:
            return stage.done
        except StageMismatch:
            if not self.overwrite:
                raise
            return False


def _claim_workspace(folder: Path, owner: str) -> None:
    """Keep unfinished work of the same key, to go on with it; discard what another key left."""
    note = folder / "key"
    if folder.exists() and not (note.exists() and note.read_text() == owner):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(owner)


def draw_replay_samples(
    stages: Stages, family: Family, config: ForgetConfig, prompts: list[str], hashes: dict[str, str]
) -> tuple[SampleSet, str]:
    """Samples of every condition, which know nothing of the concept and serve any; with their fingerprint."""
    settings = SamplingSettings(config.replay_guidance_scale, config.num_inference_steps, config.sample_batch_size)
    key = {
        "model": hashes,
        "prompts": fingerprint({"prompts": prompts}),
        "num_samples": config.num_samples,
        "empty_prompt_fraction": config.empty_prompt_fraction,
        "sampler": config.sampler,
        "settings": asdict(settings),
        "seed": config.seed,
    }
    if config.samples:
        stages.reused.append("sample")
        return load_shared_samples(Path(config.samples), hashes)
    folder = stages.output_dir / "samples"

    def compute() -> SampleSet:
        requests = sample_requests(prompts, config.num_samples, config.empty_prompt_fraction, config.seed)
        samples = _draw(family, requests, settings, folder, "samples", "sample")
        if process_state().is_main_process:
            write_json(key, folder / "samples.json")
        return samples

    samples = stages.run(
        "sample",
        key,
        compute,
        lambda: SampleSet.load(folder / "samples.safetensors"),
        workspace=folder / ".samples_parts",
    )
    return samples, fingerprint(key)


def load_shared_samples(folder: Path, hashes: dict[str, str]) -> tuple[SampleSet, str]:
    """Samples of another run. Raises ValueError when there are none or they are of another model."""
    try:
        key = json.loads((folder / "samples.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"no samples in {folder}; expected the samples/ folder of a run of this model") from error
    differing = sorted(name for name in hashes if key["model"].get(name) != hashes[name])
    if differing:
        raise ValueError(f"the samples in {folder} were drawn by a model with another {' and '.join(differing)}")
    return SampleSet.load(folder / "samples.safetensors"), fingerprint(key)


def draw_open_samples(
    stages: Stages, family: Family, config: ForgetConfig, concept: Concept, samples: SampleSet, samples_key: str
) -> SampleSet:
    """The replay set: what does not name the concept, with the samples that might show it drawn anew without it."""
    kept = select_replay(samples, concept, config.replay_negative)
    requests = negative_requests(samples, concept, config.replay_negative, config.seed)
    if not requests:
        return kept
    settings = SamplingSettings(config.negative_guidance_scale, config.num_inference_steps, config.sample_batch_size)
    folder = stages.output_dir / "samples"
    drawn = stages.run(
        "sample_without_concept",
        {
            "samples": samples_key,
            "concept": list(concept.phrasings),
            "siblings": list(concept.siblings),
            "mode": config.replay_negative,
            "sampler": config.sampler,
            "settings": asdict(settings),
            "seed": config.seed,
        },
        lambda: _draw(family, requests, settings, folder, "without_concept", "sample without the concept"),
        lambda: SampleSet.load(folder / "without_concept.safetensors"),
        counts_as="sample",
        workspace=folder / ".without_concept_parts",
    )
    return kept + drawn


def make_surrogate(
    stages: Stages,
    family: Family,
    config: ForgetConfig,
    concept: Concept,
    templates: list[str],
    hashes: dict[str, str],
) -> tuple[SampleSet, str]:
    """Pictures of the surrogate under captions of the concept, from a prompt, a folder of images, or noise."""
    folder, seed, count = stages.output_dir / "surrogate", config.seed, config.num_surrogate_samples
    settings = SamplingSettings(config.guidance_scale, config.num_inference_steps, config.sample_batch_size)
    key = {
        "model": hashes,
        "concept": list(concept.phrasings),
        "surrogate": concept.surrogate,
        "templates": fingerprint({"templates": templates}),
        "num_samples": count,
        "sampler": config.sampler,
        "settings": asdict(settings),
        "seed": seed,
    }
    paths = image_paths(concept.surrogate) if is_folder(concept.surrogate) else []
    if paths:
        key["images"] = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
    captions = concept_captions(templates, concept, count, seed)

    def compute() -> SampleSet:
        if concept.surrogate == "noise":
            samples = surrogate_from_images(family, uniform_noise(family, count, seed), [c for c, _ in captions], seed)
        elif paths:
            images = [load_image(paths[i % len(paths)], family.resolution) for i in range(count)]
            samples = surrogate_from_images(family, images, [c for c, _ in captions], seed)
        else:
            requests = surrogate_requests(captions, concept, seed)
            drawn = draw_samples(family, requests, settings, folder / ".parts", "surrogate")
            samples = SampleSet(drawn.latents, [caption for caption, _ in captions])
        _save_samples(family, samples, folder, "surrogate")
        remove_parts(folder / ".parts")
        return samples

    samples = stages.run(
        "surrogate",
        key,
        compute,
        lambda: SampleSet.load(folder / "surrogate.safetensors"),
        workspace=folder / ".parts",
    )
    return samples, fingerprint(key)


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
        fisher.check(**identity)
        stages.reused.append("fisher")
        return fisher, fingerprint(fisher.metadata)
    path = stages.output_dir / "fisher.safetensors"
    count = min(config.fisher_samples, len(samples))
    terms = config.terms
    metadata = identity | {
        "terms": config.fisher_terms,
        "num_evaluations": count * (family.loss.num_terms if terms is None else 2 * terms),
        "seed": config.seed,
        "samples": samples_key,
    }

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
    surrogate: SampleSet,
    replay: SampleSet,
    fisher: Fisher | None,
    callback: Callable[[int, dict], bool | None] | None,
) -> list[dict]:
    """Minimise Selective Amnesia's objective over the scope's weights, in place; returns the history."""
    family.module.requires_grad_(False)
    trained = family.trainable(config.train_scope)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    ewc = None if fisher is None else ElasticWeightConsolidation(trained, fisher.tensors, config.ewc_lambda)
    objective = SelectiveAmnesia(family.loss, ewc, config.replay_weight)
    size, seed = config.train_batch_size, config.seed

    def batches(step: int) -> dict:
        parts = {"surrogate": surrogate.batch(family, size, step, derive_seed(seed, "surrogate order"))}
        if config.replay_weight:
            parts["replay"] = replay.batch(family, size, step, derive_seed(seed, "replay order"))
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


def _draw(family: Family, requests: list, settings: SamplingSettings, folder: Path, name: str, what: str) -> SampleSet:
    parts_dir = folder / f".{name}_parts"
    samples = draw_samples(family, requests, settings, parts_dir, what)
    _save_samples(family, samples, folder, name)
    remove_parts(parts_dir)
    return samples


def _save_samples(family: Family, samples: SampleSet, folder: Path, name: str) -> None:
    """The latents, and a sheet of the first of them to look at."""
    if process_state().is_main_process:
        samples.save(folder / f"{name}.safetensors")
        with atomic_path(folder / f"{name}.png") as temporary:
            contact_sheet(family.decode(samples.latents[:64])).save(temporary)
