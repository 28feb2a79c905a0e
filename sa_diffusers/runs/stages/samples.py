"""Samples of every condition of the model, for replay and Fisher; they know nothing of the concept and serve any."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.data.replay import sample_requests
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import Request, SamplingSettings, draw_samples
from sa_diffusers.data.sharing import fetch_samples
from sa_diffusers.evaluation.forgetting import spread_rows
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import Marker, fingerprint, read_marker
from sa_diffusers.io.atomic_files import read_json, write_json
from sa_diffusers.io.hub import provenance
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Artifact, Stage, content_fingerprint
from sa_diffusers.report.pictures import save_contact_sheet
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.paper_quirks import stretch


DRAWING = ("sampler", "num_inference_steps", "sample_batch_size", "seed")  # options of every stage that draws


class SamplesStage(Stage[SampleSet]):
    """Samples under the prompts of what is kept, or those of another run of this model."""

    name, counts_as, inputs = "samples", "sample", ("model", "prompts")
    fields = ("num_samples", "empty_prompt_fraction", "replay_guidance_scale", *DRAWING)
    leaves = ("samples/samples.safetensors", "samples/samples.json")

    def content(self, context: RunContext) -> dict:
        return context.computed_in | ({"stretched": True} if is_stretched(context) else {})

    def given(self, context: RunContext) -> Artifact[SampleSet] | None:
        source = context.options.samples
        return _load_shared(fetch_samples(source), context) if source else None

    def compute(self, context: RunContext) -> SampleSet:
        options = context.options
        settings = drawing_settings(context, options.replay_guidance_scale)
        samples = draw_and_save(context, self.requests(context), settings, "samples", "sample")
        if process_state().is_main_process:
            origin = provenance(options.model, options.revision)
            write_json(self.key(context) | {"provenance": origin}, context.folder / "samples" / "samples.json")
        return samples

    def load(self, context: RunContext) -> SampleSet:
        return SampleSet.load(context.folder / "samples" / "samples.safetensors")

    def workspace(self, context: RunContext) -> Path:
        return parts_dir(context, "samples")

    def describe(self, context: RunContext) -> str:
        return f"{context.options.num_samples} samples of the model, which know nothing of the concept"

    def passes(self, context: RunContext) -> float:
        return drawing_passes(context, context.options.num_samples, context.options.replay_guidance_scale)

    def amount(self, context: RunContext) -> tuple[int, str]:
        return context.options.num_samples, "images"

    @staticmethod
    def requests(context: RunContext) -> list[Request]:
        options = context.options
        return sample_requests(context.prompts, options.num_samples, options.empty_prompt_fraction, options.seed)


class PicturesStage(Stage[SampleSet]):
    """Real pictures with holes, in the place of samples: a model that completes pictures draws none from nothing."""

    name = counts_as = SamplesStage.name
    inputs, fields = ("model", "pictures"), ("fisher_samples", "masks")

    def content(self, context: RunContext) -> dict:
        return {"rows": "spread"} if self._apart(context) else {}

    def compute(self, context: RunContext) -> SampleSet:
        pictures, masks, count = self._pictures(context), context.options.masks, context.options.fisher_samples
        rows = spread_rows(len(pictures), count) if self._apart(context) else range(min(count, len(pictures)))
        images = context.family.encode((2 * pictures.sample(rows) - 1).expand(-1, 3, -1, -1), torch.Generator())
        return SampleSet(images, [Condition(mask=masks[place % len(masks)]) for place in range(len(rows))])

    @staticmethod
    def _pictures(context: RunContext) -> LabelledImages:
        return context.pictures.get("fisher", context.pictures.get("retain")).train

    def _apart(self, context: RunContext) -> bool:
        """Whether they stand class by class, as in a folder, so that the first of them lack some."""
        labels = self._pictures(context).labels
        return len(labels[: context.options.fisher_samples].unique()) < len(labels.unique())

    load = compute

    def describe(self, context: RunContext) -> str:
        return "real pictures, for the Fisher"


def _load_shared(folder: Path, context: RunContext) -> Artifact[SampleSet]:
    """Samples of another run. Raises ValueError when there are none, or they are of another model or stretching."""
    hashes, stretched = context.artifacts["model"].fingerprint, is_stretched(context)
    try:
        key = read_json(folder / "samples.json", "model")
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
            f"{'asks' if stretched else 'does not ask'} for; omit --samples, or change paper_quirks"
        )
    return Artifact(SampleSet.load(folder / "samples.safetensors"), fingerprint(key))


def is_stretched(context: RunContext) -> bool:
    return "stretched_samples" in context.options.paper_quirks


def drawing_settings(context: RunContext, guidance_scale: float) -> SamplingSettings:
    options = context.options
    return SamplingSettings(guidance_scale, options.num_inference_steps, options.sample_batch_size)


def drawing_passes(context: RunContext, count: int, guidance_scale: float) -> float:
    """Forward passes of `count` pictures, without decoding."""
    return count * context.options.num_inference_steps * (context.family.guided_passes if guidance_scale > 1 else 1)


def parts_dir(context: RunContext, name: str) -> Path:
    return context.folder / "samples" / f".{name}_parts"


def drawn_before(stage: Stage[SampleSet], context: RunContext) -> dict[str, Tensor]:
    """What a stage of the chain's last run has drawn, by fingerprints of requests; nothing where it drew otherwise."""
    earlier = len(context.concepts) - len(context.requested)
    if not context.chain or not earlier or is_stretched(context):
        return {}
    last = context.of(range(earlier), context.chain[-1].folder)
    last.artifacts |= {"templates": Artifact(last.templates, content_fingerprint(last.templates))}
    marker, (file,) = Marker(last.folder, stage.name, stage.key(last)), stage.leaves
    if not marker.path.exists() or read_marker(marker.path)["fingerprint"] != marker.fingerprint:
        return {}
    marker.check()
    latents = SampleSet.load(last.folder / file).latents
    return {request.fingerprint: latent for request, latent in zip(stage.requests(last), latents, strict=True)}


def draw_and_save(
    context: RunContext,
    requests: list[Request],
    settings: SamplingSettings,
    name: str,
    description: str,
    known: Mapping[str, Tensor] | None = None,
) -> SampleSet:
    """Draw into samples/<name>.safetensors."""
    samples = draw_samples(context.family, requests, settings, parts_dir(context, name), description, known)
    if is_stretched(context):
        samples.latents = stretch(samples.latents)
    save_with_sheet(context.family, samples, context.folder / "samples", name)
    return samples


def save_with_sheet(family: Family, samples: SampleSet, folder: Path, name: str) -> None:
    """The latents, and a sheet of the first of them to look at."""
    if process_state().is_main_process:
        samples.save(folder / f"{name}.safetensors")
        save_contact_sheet(family.decode(samples.latents[:64]), folder / f"{name}.png")
