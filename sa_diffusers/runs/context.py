"""What a run knows: what every stage of it, its method and its page take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa_diffusers import methods
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.data.picture_groups import PictureGroup
from sa_diffusers.evaluation.judges.preference import ClipPreferenceJudge, PreferenceJudge
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import Family
from sa_diffusers.io.model_names import base_name
from sa_diffusers.io.stages import Artifact
from sa_diffusers.models.precision import in_main_memory
from sa_diffusers.runs.chain import Link, Merge, chain_of
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.training.strengths import Strength, chosen


@dataclass
class Inputs:
    """The concepts, the prompts, and what the model is judged by: sets of prompts, and classifiers by their names.

    Without a classifier the pictures of the sets are there to be looked at.
    `notes` are what the plan says of them. `pictures` are real ones, of a model that completes these. `requested` are
    those of the concepts, the last ones, that no earlier run of a chain has forgotten; None: all.
    """

    concepts: Concepts
    prompts: list[str]
    templates: list[list[str]]  # of each concept
    judges: dict[str, ClassifierJudge]
    sets: dict[str, PromptSet]
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, PictureGroup] = field(default_factory=dict)
    requested: int | None = None


@dataclass
class RunContext:
    """One run of a method on a model: its options without open ones, inputs, family, folder and artifacts by name."""

    options: RunOptions
    inputs: Inputs
    family: Family
    folder: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    forgotten: list[dict[str, Any]] = field(default_factory=list)  # by the model, before this run
    started: str | None = None  # the day that the folder was made its own
    preference: PreferenceJudge | ClipPreferenceJudge | None = None  # what judges where no classifier does
    spent: dict[str, float] = field(default_factory=dict)  # seconds, before its stages are known
    original: dict[str, Tensor] | None = None  # weights of what is trained, where other strengths are mixed with them
    merge: Merge | None = None  # what is done in the place of training

    @property
    def method(self) -> methods.Method:
        return methods.get(self.options.method)

    concepts = property(attrgetter("inputs.concepts"))
    prompts = property(attrgetter("inputs.prompts"))
    templates = property(attrgetter("inputs.templates"))
    pictures = property(attrgetter("inputs.pictures"))

    @property
    def requested(self) -> Concepts:
        """Those that no earlier run of the chain has forgotten."""
        return Concepts(self.concepts[-(self.inputs.requested or len(self.concepts)) :])

    @cached_property
    def chain(self) -> list[Link]:
        """The runs that this one goes on from."""
        return chain_of(self.options.after)

    @property
    def adapters(self) -> list[Path]:
        """Files of those of earlier runs that training goes on from; none where one of these left none."""
        found = [link.adapters for link in self.chain] if self.options.lora_rank else []
        return [file for files in found for file in files] if all(found) else []

    def of(self, rows: Sequence[int], folder: Path) -> "RunContext":
        """The run as it would be of some of its concepts alone, in a folder of its own, with what it has drawn."""
        concepts, earlier = Concepts(self.concepts[row] for row in rows), len(self.concepts) - len(self.requested)
        names, sets = {one.name for one in concepts}, dict(self.inputs.sets)
        asking = sets["concept"]
        sets["concept"] = asking.take([i for i, one in enumerate(asking.candidates) if one.word in names])
        own = {"concepts": concepts, "templates": [self.templates[row] for row in rows], "sets": sets}
        inputs = replace(self.inputs, **own, requested=sum(row >= earlier for row in rows))
        shown = {name: self.value(name) for name in ("surrogate", "concept_samples") if self.value(name) is not None}
        shown = {name: Artifact(samples.of_shares(rows), None) for name, samples in shown.items()}
        return replace(self, inputs=inputs, folder=folder, artifacts=self.artifacts | shown)

    @property
    def edited(self) -> Concepts:
        """Those that a closed-form edit forgets: adapters that are kept hold the others already."""
        return self.requested if self.adapters else self.concepts

    @property
    def strength(self) -> Strength:
        """Of the result."""
        return chosen(self.options)

    @property
    def result(self) -> str:
        """Name of its judgement."""
        return "after" if self.strength.trained else self.strength.name

    @property
    def surrogates(self) -> list[str | None]:
        """Of each concept, as others may read it: of a folder its name."""
        folders = self.concepts.surrogate_kind == "images"
        return [base_name(one.surrogate) if folders else one.surrogate for one in self.concepts]

    @property
    def surrogate(self) -> str | None:
        """Every one of them, once."""
        return "; ".join(filter(None, dict.fromkeys(self.surrogates))) if any(self.surrogates) else self.surrogates[0]

    @property
    def favours_words(self) -> bool:
        """Whether words take the concepts' places."""
        in_words = self.method.favours and self.concepts.surrogate_kind == "prompt"
        return in_words and all(one.surrogate for one in self.concepts)

    @property
    def needs(self) -> set[str]:
        return self.method.needs(self.options, self.concepts)

    @property
    def computed_in(self) -> dict[str, str]:
        """The part of a key that names the precision of forward passes, where that is not the weights' own."""
        dtype, bits = self.family.compute_dtype, self.options.quantize_base
        said = {} if dtype is None else {"compute_dtype": str(dtype).removeprefix("torch.")}
        return said if bits is None else said | {"bits": str(bits)}

    def value(self, need: str) -> Any:
        """An artifact's value; None where the run has none of that name."""
        return self.artifacts[need].value if need in self.artifacts else None


@contextmanager
def prepared(family: Family, options: RunOptions) -> Iterator[None]:
    """The trained module in float32 and as fast as was asked for, and its helpers off the device, for a while.

    Under adapters it stays in the precision that is computed in anyway.
    """
    module, parts = family.module, family.pipeline.components
    helpers = [parts[name] for name in family.helpers if parts.get(name) is not None]
    try:
        as_it_is = options.quantize_base or module.dtype == family.compute_dtype
        if module.dtype != torch.float32 and not (options.lora_rank and as_it_is):
            module.to(torch.float32)
        if options.channels_last:
            module.to(memory_format=torch.channels_last)
        if options.compile_backend:
            module.compile(backend=options.compile_backend)
        with in_main_memory(helpers) if options.offload else nullcontext():
            yield
    finally:
        module._compiled_call_impl = None  # torch has no public way back from Module.compile
        module.to(memory_format=torch.contiguous_format)
        if options.dtype != "float32":
            module.to(getattr(torch, options.dtype))  # the precision of the other parts, as in the saved pipeline
