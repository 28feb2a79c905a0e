"""What a run knows: what every stage of it, its method and its page take."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sa_diffusers import methods
from sa_diffusers.core.concepts import Concept, mentions, split_phrasings
from sa_diffusers.data.picture_groups import PictureGroup
from sa_diffusers.evaluation.judges.preference import ClipPreferenceJudge, PreferenceJudge
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import Family
from sa_diffusers.io.forgotten import said_of
from sa_diffusers.io.model_names import base_name
from sa_diffusers.io.stages import Artifact
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.training.strengths import Strength, chosen


@dataclass
class Inputs:
    """The concept, the prompts, and what the model is judged by: sets of prompts, and classifiers by their names.

    Without a classifier the pictures of the sets are there to be looked at.
    `notes` are what the plan says of them. `pictures` are real ones, of a model that completes these.
    """

    concept: Concept
    prompts: list[str]
    templates: list[str]
    judges: dict[str, ClassifierJudge]
    sets: dict[str, PromptSet]
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, PictureGroup] = field(default_factory=dict)


@dataclass
class RunContext:
    """One run of a method on a model: its options without open ones, inputs, family, folder and artifacts by name."""

    options: RunOptions
    inputs: Inputs
    family: Family
    folder: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    forgotten: list[dict[str, Any]] = field(default_factory=list)  # by the model, before this run
    preference: PreferenceJudge | ClipPreferenceJudge | None = None  # what judges where no classifier does
    original: dict[str, Tensor] | None = None  # weights of what is trained, where other strengths are mixed with them

    @property
    def method(self) -> methods.Method:
        return methods.get(self.options.method)

    @property
    def concept(self) -> Concept:
        return self.inputs.concept

    @property
    def strength(self) -> Strength:
        """Of the result."""
        return chosen(self.options)

    @property
    def result(self) -> str:
        """Name of its judgement."""
        return "after" if self.strength.trained else self.strength.name

    @property
    def surrogate(self) -> str | None:
        """As others may read it: of a folder its name."""
        concept = self.concept
        return base_name(concept.surrogate) if concept.surrogate_kind == "images" else concept.surrogate

    @property
    def favoured_prompt(self) -> str | None:
        """The surrogate where it is one in words that takes the concept's place."""
        in_words = self.method.favours and self.concept.surrogate_kind == "prompt"
        return self.concept.surrogate or None if in_words else None

    @property
    def warning(self) -> str | None:
        """Where the surrogate is something that the model itself has forgotten: pictures of it show something else."""
        asked = self.concept.surrogate if self.concept.surrogate_kind == "prompt" else ""
        for record in self.forgotten:
            if self.method.favours and mentions(asked, split_phrasings(record["concept"])):
                return f"The surrogate “{asked}” was itself forgotten by this model: {said_of(record)}."
        return None

    @property
    def prompts(self) -> list[str]:
        return self.inputs.prompts

    @property
    def templates(self) -> list[str]:
        return self.inputs.templates

    @property
    def pictures(self) -> dict[str, PictureGroup]:
        return self.inputs.pictures

    @property
    def needs(self) -> set[str]:
        return self.method.needs(self.options, self.concept)

    @property
    def computed_in(self) -> dict[str, str]:
        """The part of a key that names the precision of forward passes, where that is not the weights' own."""
        dtype, bits = self.family.compute_dtype, self.options.quantize_base
        said = {} if dtype is None else {"compute_dtype": str(dtype).removeprefix("torch.")}
        return said if bits is None else said | {"bits": str(bits)}

    def value(self, need: str) -> Any:
        """An artifact's value; None where the run has none of that name."""
        return self.artifacts[need].value if need in self.artifacts else None
