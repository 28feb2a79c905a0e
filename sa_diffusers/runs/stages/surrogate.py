"""Pictures of the surrogate under captions of the concept, from a prompt, a folder of images, or noise."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path

from sa_diffusers.core.concepts import Concept, lone
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.concepts.given import describe_surrogates
from sa_diffusers.data.images import image_paths, load_image
from sa_diffusers.data.replay import concept_captions, surrogate_requests
from sa_diffusers.data.sample_set import SampleSet, surrogate_from_images, uniform_noise
from sa_diffusers.data.sampling import Request, draw_samples
from sa_diffusers.io.artifacts import DamagedFile
from sa_diffusers.io.atomic_files import file_hash
from sa_diffusers.io.stages import Stage
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.samples import (
    DRAWING,
    drawing_passes,
    drawing_settings,
    drawn_before,
    save_with_sheet,
)


DRAWN = ("prompt", "concept")  # kinds of what is drawn by the model


class SurrogateStage(Stage[SampleSet]):
    """Pictures of the surrogate; of the concept itself where the method unlearns these, or an adversary is after them.

    Args:
        name: "surrogate", or "concept_samples": the adversary's.
        share: how many, of `num_surrogate_samples`.
    """

    counts_as = "surrogate"
    inputs, fields = ("model", "templates"), ("num_surrogate_samples", "guidance_scale", *DRAWING)

    def __init__(self, name: str = "surrogate", share: float = 1.0):
        self.name, self.share, self.leaves = name, share, (f"surrogate/{name}.safetensors",)

    def content(self, context: RunContext) -> dict:
        concepts = context.concepts
        said = context.computed_in | concepts.key | {"kind": self._kind(context)}
        if self._kind(context) == "images":
            hashes = [[file_hash(path)[:16] for path in image_paths(one.surrogate)] for one in concepts]
            return said | {"images": lone(hashes)}
        return said | ({"surrogate": concepts.each("surrogate")} if self._kind(context) == "prompt" else {})

    def compute(self, context: RunContext) -> SampleSet:
        options, family, concepts = context.options, context.family, context.concepts
        count, seed, folder = self._count(context), options.seed, context.folder / "surrogate"
        asked = self._captions(context)
        captions, kind = [caption for caption, *_ in asked], self._kind(context)
        if kind == "noise":
            samples = surrogate_from_images(family, uniform_noise(family, count, seed), captions, seed)
        elif kind == "images":
            paths = {one: cycle(image_paths(one.surrogate)) for one in concepts}
            images = [load_image(next(paths[one]), family.resolution) for *_, one in asked]
            samples = surrogate_from_images(family, images, captions, seed)
        else:
            settings, known = drawing_settings(context, options.guidance_scale), drawn_before(self, context)
            requests, workspace = self.requests(context), self.workspace(context)
            drawn = draw_samples(family, requests, settings, workspace, "surrogate", known)
            samples = SampleSet(drawn.latents, list(map(Condition, captions)))
        save_with_sheet(family, samples, folder, self.name)
        return replace(samples, shares=len(concepts))

    def load(self, context: RunContext) -> SampleSet:
        samples = SampleSet.load(context.folder / "surrogate" / f"{self.name}.safetensors")
        return replace(samples, shares=len(context.concepts))

    def workspace(self, context: RunContext) -> Path:
        return context.folder / "surrogate" / f".{self.name}_parts"

    def describe(self, context: RunContext) -> str:
        own = self._kind(context) == "concept"
        shown = f"the concept, {context.concepts.name!r}" if own else describe_surrogates(context.concepts)
        there = self._count(context) - self._left(context)
        return f"{self._count(context)} pictures" + (f", {there} of them drawn before" if there else "") + f": {shown}"

    def passes(self, context: RunContext) -> float:
        left = self._left(context) if self._kind(context) in DRAWN else 0
        return drawing_passes(context, left, context.options.guidance_scale)

    def amount(self, context: RunContext) -> tuple[int, str]:
        return self._count(context), "images"

    def requests(self, context: RunContext) -> list[Request]:
        own = self._kind(context) == "concept"
        return surrogate_requests(self._captions(context), context.concepts, context.options.seed, keep_concept=own)

    def _captions(self, context: RunContext) -> list[tuple[str, str, Concept]]:
        return concept_captions(context.templates, context.concepts, self._count(context), context.options.seed)

    def _left(self, context: RunContext) -> int:
        """Pictures that are still to be made: a chain's last run may have drawn others."""
        try:
            known = drawn_before(self, context) if self._kind(context) in DRAWN else {}
        except DamagedFile:  # which matters to no plan
            known = {}
        return sum(one.fingerprint not in known for one in self.requests(context)) if known else self._count(context)

    def _count(self, context: RunContext) -> int:
        return max(len(context.concepts), round(self.share * context.options.num_surrogate_samples))

    def _kind(self, context: RunContext) -> str:
        own = context.method.own_samples or self.name != "surrogate"
        return "concept" if own else context.concepts.surrogate_kind
