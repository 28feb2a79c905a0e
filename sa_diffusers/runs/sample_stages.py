"""The stages that draw: samples for replay and Fisher, and pictures of the surrogate."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from sa_diffusers.core.paper_quirks import stretch
from sa_diffusers.data.images import image_paths, load_image
from sa_diffusers.data.prompts import Concept, is_folder
from sa_diffusers.data.replay import (
    concept_captions,
    negative_requests,
    sample_requests,
    select_replay,
    surrogate_requests,
)
from sa_diffusers.data.sample_set import SampleSet, surrogate_from_images, uniform_noise
from sa_diffusers.data.sampling import SamplingSettings, draw_samples, remove_parts
from sa_diffusers.data.sharing import fetch_samples
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path, write_json
from sa_diffusers.io.hub import provenance
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Stages
from sa_diffusers.report.pictures import contact_sheet
from sa_diffusers.runs.options import ForgetConfig


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
    } | computed_in(family)
    stretched = "stretched_samples" in config.paper_quirks
    if stretched:
        key["stretched"] = True
    if config.samples:
        stages.reused.append("sample")
        return load_shared_samples(fetch_samples(config.samples), hashes, stretched)
    folder = stages.output_dir / "samples"

    def compute() -> SampleSet:
        requests = sample_requests(prompts, config.num_samples, config.empty_prompt_fraction, config.seed)
        samples = _draw(family, requests, settings, folder, "samples", "sample", stretched)
        if process_state().is_main_process:
            origin = provenance(config.model, config.revision)
            write_json(key | {"provenance": origin}, folder / "samples.json")
        return samples

    samples = stages.run(
        "sample",
        key,
        compute,
        lambda: SampleSet.load(folder / "samples.safetensors"),
        workspace=folder / ".samples_parts",
    )
    return samples, fingerprint(key)


def computed_in(family: Family) -> dict[str, str]:
    """The part of a key that names the precision of forward passes, where that is not the weights' own."""
    dtype = family.compute_dtype
    return {} if dtype is None else {"compute_dtype": str(dtype).removeprefix("torch.")}


def load_shared_samples(folder: Path, hashes: dict[str, str], stretched: bool = False) -> tuple[SampleSet, str]:
    """Samples of another run. Raises ValueError when there are none, or they are of another model or stretching."""
    try:
        key = json.loads((folder / "samples.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(f"no samples in {folder}; expected the samples/ folder of a run of this model") from error
    origin = key.pop("provenance", None)  # where they come from decides nothing
    differing = sorted(name for name in hashes if key["model"].get(name) != hashes[name])
    if differing:
        fields = "; ".join(f"{name}: expected {hashes[name]}, got {key['model'].get(name)}" for name in differing)
        by = f" ({origin['model']})" if (origin or {}).get("model") else ""
        raise ValueError(f"the samples in {folder} were drawn by another model{by}, which differs in {fields}")
    if key.get("stretched", False) != stretched:
        raise ValueError(
            f"the samples in {folder} were {'not ' if stretched else ''}stretched, which paper_quirks "
            f"{'asks' if stretched else 'does not ask'} for; leave --samples away, or change paper_quirks"
        )
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
    folder, stretched = stages.output_dir / "samples", "stretched_samples" in config.paper_quirks
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
        }
        | computed_in(family),
        lambda: _draw(family, requests, settings, folder, "without_concept", "sample without the concept", stretched),
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
    } | computed_in(family)
    paths = image_paths(concept.surrogate) if is_folder(concept.surrogate) else []
    if paths:
        key["images"] = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
    captions = concept_captions(templates, concept, count, seed)
    naive = config.method == "naive"  # it unlearns the concept's own samples, whatever the surrogate
    if naive:
        key["method"] = config.method

    def compute() -> SampleSet:
        if concept.surrogate == "noise" and not naive:
            samples = surrogate_from_images(family, uniform_noise(family, count, seed), [c for c, _ in captions], seed)
        elif paths and not naive:
            images = [load_image(paths[i % len(paths)], family.resolution) for i in range(count)]
            samples = surrogate_from_images(family, images, [c for c, _ in captions], seed)
        else:
            requests = surrogate_requests(captions, concept, seed, naive)
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


def _draw(
    family: Family,
    requests: list,
    settings: SamplingSettings,
    folder: Path,
    name: str,
    what: str,
    stretched: bool = False,
) -> SampleSet:
    parts_dir = folder / f".{name}_parts"
    samples = draw_samples(family, requests, settings, parts_dir, what)
    if stretched:
        samples.latents = stretch(samples.latents)
    _save_samples(family, samples, folder, name)
    remove_parts(parts_dir)
    return samples


def _save_samples(family: Family, samples: SampleSet, folder: Path, name: str) -> None:
    """The latents, and a sheet of the first of them to look at."""
    if process_state().is_main_process:
        samples.save(folder / f"{name}.safetensors")
        with atomic_path(folder / f"{name}.png") as temporary:
            contact_sheet(family.decode(samples.latents[:64])).save(temporary)
