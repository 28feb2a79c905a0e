"""Pictures of the surrogate under captions of the concept, from a prompt, a folder of images, or noise."""

import hashlib
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from sa_diffusers.core.concepts import lone
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.concepts import describe_surrogates
from sa_diffusers.data.images import image_paths, load_image
from sa_diffusers.data.replay import concept_captions, surrogate_requests
from sa_diffusers.data.sample_set import SampleSet, surrogate_from_images, uniform_noise
from sa_diffusers.data.sampling import draw_samples, remove_parts
from sa_diffusers.io.stages import Stage
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.samples import DRAWING, drawing_passes, drawing_settings, save_with_sheet


class SurrogateStage(Stage[SampleSet]):
    """Pictures of the surrogate, or, where the method unlearns these, of the concept itself."""

    name = counts_as = "surrogate"
    inputs, fields = ("model", "templates"), ("num_surrogate_samples", "guidance_scale", *DRAWING)
    leaves = ("surrogate/surrogate.safetensors",)

    def content(self, context: RunContext) -> dict:
        concepts = context.concepts
        said = context.computed_in | concepts.key | {"kind": self._kind(context)}
        if self._kind(context) == "images":
            folders = [[path.read_bytes() for path in image_paths(one.surrogate)] for one in concepts]
            return said | {"images": lone([[hashlib.sha256(b).hexdigest()[:16] for b in part] for part in folders])}
        return said | ({"surrogate": concepts.each("surrogate")} if self._kind(context) == "prompt" else {})

    def compute(self, context: RunContext) -> SampleSet:
        options, family, concepts = context.options, context.family, context.concepts
        count, seed, folder = options.num_surrogate_samples, options.seed, context.folder / "surrogate"
        asked = concept_captions(context.templates, concepts, count, seed)
        captions, kind = [caption for caption, *_ in asked], self._kind(context)
        if kind == "noise":
            samples = surrogate_from_images(family, uniform_noise(family, count, seed), captions, seed)
        elif kind == "images":
            paths = {one: cycle(image_paths(one.surrogate)) for one in concepts}
            images = [load_image(next(paths[one]), family.resolution) for *_, one in asked]
            samples = surrogate_from_images(family, images, captions, seed)
        else:
            requests = surrogate_requests(asked, concepts, seed, keep_concept=kind == "concept")
            settings = drawing_settings(context, options.guidance_scale)
            drawn = draw_samples(family, requests, settings, self.workspace(context), "surrogate")
            samples = SampleSet(drawn.latents, list(map(Condition, captions)))
        save_with_sheet(family, samples, folder, "surrogate")
        remove_parts(self.workspace(context))
        return replace(samples, shares=len(concepts))

    def load(self, context: RunContext) -> SampleSet:
        samples = SampleSet.load(context.folder / "surrogate" / "surrogate.safetensors")
        return replace(samples, shares=len(context.concepts))

    def workspace(self, context: RunContext) -> Path:
        return context.folder / "surrogate" / ".parts"

    def describe(self, context: RunContext) -> str:
        own = context.method.own_samples
        shown = f"the concept, {context.concepts.name!r}" if own else describe_surrogates(context.concepts)
        return f"{context.options.num_surrogate_samples} pictures: {shown}"

    def passes(self, context: RunContext) -> float:
        drawn = self._kind(context) in ("prompt", "concept")
        count = context.options.num_surrogate_samples if drawn else 0
        return drawing_passes(context, count, context.options.guidance_scale)

    def amount(self, context: RunContext) -> tuple[int, str]:
        return context.options.num_surrogate_samples, "images"

    @staticmethod
    def _kind(context: RunContext) -> str:
        return "concept" if context.method.own_samples else context.concepts.surrogate_kind
