"""Every option of a forgetting run (configs/default.yaml): those of all methods, and each method's own."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from sa_diffusers import methods
from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.data.concepts.lists import split_list
from sa_diffusers.data.sampling import DrawingOptions
from sa_diffusers.evaluation.intervals import deciding_count
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.methods import ROBUST
from sa_diffusers.models.single_file import is_single_file
from sa_diffusers.runs.work_options import (
    ConceptOptions,
    FisherOptions,
    FolderOptions,
    MethodOptions,
    SampleOptions,
)  # fmt: skip
from sa_diffusers.training.options import PerformanceOptions, TrainingConfig
from sa_diffusers.training.strengths import StrengthOptions, chosen


@dataclass
class ModelOptions(Options):
    """Which model, and in which precision."""

    model: str = option(
        "CompVis/stable-diffusion-v1-4",
        "Pipeline: hub id, local folder, or bundled/digits/pipeline.",
        identity=False,
        everyday=True,
    )
    revision: str | None = option(None, "Revision of a hub model.", identity=False)
    variant: str | None = option(None, "Variant of the weight files, such as fp16.", identity=False)
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "Precision of frozen parts and of the saved pipeline; what is trained is float32 meanwhile."
    )


@dataclass
class PromptOptions(Options):
    """What is kept, and how the concept is asked for."""

    replay_prompts: str = option(
        "bundled/stable_diffusion/replay_prompts.txt",
        "Prompts of what to keep: a text file, or a data set with a column; labels: the classes of a model that has "
        "them.",
        identity=False,
        everyday=True,
    )
    prompt_column: str = option("prompt", "Column of --replay_prompts where that is a data set.", identity=False)
    concept_templates: str = option(
        "bundled/stable_diffusion/concept_templates.txt",
        "Text file of prompts with {} in the concept's place; used if fewer than 16 of --replay_prompts name it.",
        identity=False,
    )


@dataclass
class TrackingOptions(Options):
    """What is looked at while training."""

    snapshot_steps: list[int] = option(
        [], "Save the pipeline as it is after each of these steps, to snapshots/: one run, several strengths.", above=0
    )
    track_steps: int | None = option(
        None, "Draw pictures (and let the classifier read them) every so many steps.", above=0, identity=False
    )
    track_images: int = option(
        16, "Pictures drawn then: half of the concept, half of the rest; see early_stop.", above=0, identity=False
    )
    early_stop: float | None = option(
        None,
        "Stop once the concept's probability is surely below this, by the 95 % interval of tracked pictures: of the "
        "concept at least as many are drawn as tell where a quarter of it is left (0.1: 62). Needs track_steps, "
        "classifier.",
        above=0,
        below=1,
    )

    @property
    def tracked_of_concept(self) -> int:
        """How many of the tracked pictures ask for the concept."""
        return max(1, self.track_images // 2, deciding_count(self.early_stop) if self.early_stop else 0)

    @property
    def callback_steps(self) -> int | None:
        """How often training must stop to be looked at: whatever is tracked or saved falls on a multiple of it."""
        return math.gcd(self.track_steps or 0, *self.snapshot_steps) or None


@dataclass
class EvaluationOptions(Options):
    """By what the result is judged."""

    before: str | None = option(
        None,
        "Evaluation of this model to reuse: a run's folder, or the evaluation/before.safetensors of one, of whatever "
        "concept; pictures that it lacks are drawn. null: none, but for what ships with a bundled model.",
        identity=False,
    )
    classifier: list[str] = option(
        [], "Classifier for evaluation only: folder or hub id; may be repeated.", identity=False, everyday=True
    )
    clip: str | None = option(
        None,
        "CLIP (folder or hub id) that judges between concept and surrogate where no classifier is given; null: the "
        "model itself, as it was.",
        identity=False,
    )
    eval_prompts: str | None = option(
        None, "Labelled prompts (JSON lines) that the classifier can judge.", identity=False
    )
    eval_images_concept: int = option(200, "Pictures of the concept in seen phrasings.", least=0, identity=False)
    eval_images_class: int = option(100, "Pictures of each retained class.", least=0, identity=False)
    eval_images_other: int = option(
        300, "Pictures each of unseen phrasings and of prompts that do not name the concept.", least=0, identity=False
    )


@dataclass
class SharingOptions(Options):
    """What else is saved, and pushed."""

    save_variant: Literal["fp16"] | None = option(
        None, "fp16: also save the weights in float16, as a variant of the pipeline.", identity=False
    )
    save_single_file: bool = option(
        False,
        "Save the pipeline besides as one file in float16, with the names of the file that --model is, and an adapter "
        "with those that other programs know.",
        identity=False,
    )
    push_to_hub: bool = option(
        False,
        "Push the pipeline, or with lora_rank and no finish the adapter, when all is done.",
        identity=False,
        everyday=True,
    )
    hub_model_id: str | None = option(
        None, "Repository to push to; null: <base model's name>-without-<concept>.", identity=False
    )
    hub_private: bool = option(False, "Make that repository private.", identity=False)


def consistent(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers without what a method or `robust` settled before a later one says otherwise, or settles itself.

    And without concepts where a later one names others, by themselves or in a list.
    """
    layers = [_still_named(layer, layers[position + 1 :]) for position, layer in enumerate(layers)]
    said = [position for position, layer in enumerate(layers) if "robust" in layer]
    if said and layers[said[-1]]["robust"]:
        layers = [{n: v for n, v in a.items() if n not in ROBUST or i >= said[-1]} for i, a in enumerate(layers)]
    elif said:
        layers = [{n: v for n, v in a.items() if not a.get("robust") or ROBUST.get(n, ...) != v} for a in layers]
    chosen = [position for position, layer in enumerate(layers) if layer.get("method")]
    if not chosen:
        return layers
    last, found, current = layers[chosen[-1]]["method"], [], None
    for position, layer in enumerate(layers):
        current = layer.get("method") or current
        settled = set(methods.get(last).fixes) if position < chosen[-1] else set()
        if current not in (None, last):
            settled |= methods.get(current).fixes.keys()
        found.append({name: value for name, value in layer.items() if name not in settled})
    return found


def _still_named(layer: Mapping[str, Any], later: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    replaced = {"concepts"} if any(one.get("concept") for one in later) else set()
    if any(one.get("concepts") for one in later):
        replaced |= {"concept", "surrogate", "siblings"}
    return {name: value for name, value in layer.items() if name not in replaced}


@dataclass
class RunOptions(
    TrainingConfig, PerformanceOptions, SharingOptions, TrackingOptions, EvaluationOptions, StrengthOptions,
    FisherOptions, SampleOptions, DrawingOptions, PromptOptions, MethodOptions, FolderOptions, ModelOptions,
    ConceptOptions,
):  # fmt: skip
    """What every method can be told. Raises ValueError for values that cannot work, before anything is loaded."""

    num_train_steps: int = option(250, "Optimiser steps.", above=0, everyday=True)
    train_batch_size: int = option(
        8,
        "Surrogate samples, and as many replay samples, in an optimiser step; all processes and parts share them.",
        above=0,
    )
    learning_rate: float = option(5e-5, "Peak learning rate; never scaled silently.", above=0, everyday=True)
    lr_warmup_steps: int = option(10, "Optimiser steps of linear warm-up.", least=0)
    checkpointing_steps: int | None = option(
        125, "Save a checkpoint every so many steps; null: off.", above=0, identity=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for phrasings in split_list(self.concept) if self.concept else ():
            split_phrasings(phrasings)
        if self.concepts and (self.concept or self.surrogate or self.siblings):
            raise ValueError("concepts names a file that says what to forget; omit concept, surrogate and siblings")
        if self.replay_prompt_dropout and self.fresh_samples:
            raise ValueError("replay_prompt_dropout: a model that draws fresh samples has no guidance; expected 0")
        if self.save_single_file and not (self.leaves_adapter or is_single_file(self.model)):
            raise ValueError(
                "save_single_file writes the file again that --model is, or an adapter; expected a .safetensors or "
                f".ckpt file, got {self.model}"
            )
        if self.early_stop is not None and not (self.track_steps and self.classifier):
            raise ValueError("early_stop needs track_steps and a classifier")
        if self.clip and self.classifier:
            raise ValueError("clip judges where no classifier does, got both; omit one of them")
        if self.early_stop is not None and self.tracked_of_concept > self.eval_images_concept:
            raise ValueError(
                f"early_stop {self.early_stop:g} looks at {self.tracked_of_concept} pictures of the concept, of which "
                f"there are {self.eval_images_concept}; raise --eval_images_concept, or --early_stop"
            )
        if self.quantize_base is not None:
            self._check_quantized()
        method = methods.get(self.method)
        asked = next((name for name in ("forget_images", "retrained") if getattr(self, name)), None)
        if asked and not method.completes:
            fitting = " or ".join(name for name, one in methods.registry().items() if one.completes)
            raise ValueError(f"{asked}: {self.method} forgets words or classes; pass --method {fitting}")
        for name, own in method.fixes.items():
            if getattr(self, name) not in (None, own):
                raise ValueError(
                    f"{self.method} works with {name} {own} alone, got {getattr(self, name)}; omit it, or pass "
                    "another --method"
                )
        method.check_options(self.resolved())
        chosen(self)
        if (self.strength_sheet or self.strength) and type(method).wrap is not methods.Method.wrap:
            raise ValueError(f"{method.name} changes no weights, which could be more or less; omit strength_sheet")
        if self.after and (self.strength_sheet or self.strength):
            raise ValueError(
                "the strength of a chain is that of several runs; omit after, or strength_sheet and strength"
            )
        if (self.strength_sheet or self.strength) and self.early_stop is not None and self.snapshot_steps:
            raise ValueError("early_stop may end training before one of the snapshots that are judged; omit either")

    def _check_quantized(self) -> None:
        kept = "the whole weights, which wait in main memory"
        for wrong, fault in (
            (self.quantize_base not in (8, 4), f"expected 8 or 4 bits, got {self.quantize_base}"),
            (find_spec("bitsandbytes") is None, 'needs bitsandbytes: pip install "sa_diffusers[8bit]"'),
            (self.lora_rank is None, "such weights cannot be trained; pass a lora_rank"),
            (self.fisher_layers == "all", "has no room for the Fisher of all weights; pass fisher_layers trained"),
            (
                "edit" in (self.start, self.finish) or self.after,
                f"edits, and runs to go on after, are of {kept}; omit it",
            ),
            (self.strength_sheet or self.strength or self.snapshot_steps, f"other strengths are of {kept}; omit them"),
        ):
            if wrong:
                raise ValueError(f"quantize_base: {fault}")

    consistent = staticmethod(consistent)

    @classmethod
    def topics(cls) -> dict[str, tuple[str, list[str] | None]]:
        """What `--help TOPIC` shows: a text, and names of options besides the everyday ones; None: the text alone."""
        known = methods.registry()
        found = {"methods": ("\n" + "\n".join(f"    {m.name}: {m.summary}." for m in known.values()), None)}
        for name, method in known.items():
            found[name] = (f"{method.title}: {method.summary}.", list(getattr(method.Options, "__annotations__", ())))
        return found

    def resolved(self) -> "RunOptions":
        """A copy without open options: each has the method's value, or else the one for all methods."""
        given, resolved = methods.get(self.method).fixes, copy.copy(self)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and "otherwise" in field.metadata:
                setattr(resolved, field.name, given.get(field.name, field.metadata["otherwise"]))
        return resolved


@lru_cache
def _config_class(names: tuple[str, ...]) -> type[RunOptions]:
    method = next(field for field in dataclasses.fields(RunOptions) if field.name == "method")
    field = ("method", Literal[names], option(method.default, **method.metadata))
    own = dict.fromkeys(methods.get(name).Options for name in names if methods.get(name).Options is not None)
    namespace = {"__doc__": __doc__, "__module__": __name__}
    return dataclasses.make_dataclass("ForgetConfig", [field], bases=(*own, RunOptions), namespace=namespace)


def __getattr__(name: str) -> Any:
    # Made of the methods that are registered now: each may bring options of its own.
    if name == "ForgetConfig":
        return _config_class(tuple(methods.registry()))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
