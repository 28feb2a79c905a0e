"""Every option of a forgetting run (configs/default.yaml): those of all methods, and each method's own."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from sa_diffusers import methods
from sa_diffusers.data.sampling import DrawingOptions
from sa_diffusers.io.configuration import option
from sa_diffusers.runs.concerns import (
    ConceptOptions,
    EvaluationOptions,
    FisherOptions,
    FolderOptions,
    MethodOptions,
    ModelOptions,
    PromptOptions,
    SampleOptions,
    SharingOptions,
    SpeedOptions,
    TrackingOptions,
)
from sa_diffusers.training.options import TrainingConfig


@dataclass
class RunOptions(
    SharingOptions, EvaluationOptions, TrackingOptions, SpeedOptions, FisherOptions, MethodOptions, SampleOptions,
    DrawingOptions, PromptOptions, FolderOptions, ModelOptions, ConceptOptions, TrainingConfig,
):  # fmt: skip
    """What every method can be told. Raises ValueError for values that cannot work, before anything is loaded."""

    num_train_steps: int = option(250, "Optimiser steps.", above=0)
    train_batch_size: int = option(
        8,
        "Surrogate samples, and as many replay samples, in an optimiser step; all processes and parts share them.",
        above=0,
    )
    learning_rate: float = option(5e-5, "Peak learning rate; never scaled silently.", above=0)
    lr_warmup_steps: int = option(10, "Optimiser steps of linear warm-up.", least=0)
    checkpointing_steps: int | None = option(
        125, "Save a checkpoint every so many steps; null: none.", above=0, identity=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay_prompt_dropout and self.fresh_samples:
            raise ValueError("replay_prompt_dropout: a model that draws fresh samples has no guidance; expected 0")
        if self.early_stop is not None and not (self.track_steps and self.classifier):
            raise ValueError("early_stop needs track_steps and a classifier")
        method = methods.get(self.method)
        for name, own in method.fixes.items():
            if getattr(self, name) not in (None, own):
                raise ValueError(
                    f"{self.method} works with {name} {own} alone, got {getattr(self, name)}; omit it, or pass "
                    "another --method"
                )
        method.check_options(self.resolved())

    @classmethod
    def settled_by(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The options that a choice of method settles: what was written for another method does not count then."""
        return tuple(methods.get(values["method"]).fixes) if values.get("method") else ()

    def resolved(self) -> "RunOptions":
        """A copy without open options: each has the method's value, or else the one for all methods."""
        given, resolved = methods.get(self.method).fixes, copy.copy(self)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and "otherwise" in field.metadata:
                setattr(resolved, field.name, given.get(field.name, field.metadata["otherwise"]))
        return resolved


@lru_cache
def _config_class(names: tuple[str, ...]) -> type[RunOptions]:
    chosen = [methods.get(name) for name in names]
    about = " ".join(f"{method.name}: {method.summary}." for method in chosen)
    field = ("method", Literal[names], option(methods.DEFAULT, f"How to forget. {about}"))
    own = dict.fromkeys(method.Options for method in chosen if method.Options is not None)
    namespace = {"__doc__": __doc__, "__module__": __name__}
    return dataclasses.make_dataclass("ForgetConfig", [field], bases=(*own, RunOptions), namespace=namespace)


def __getattr__(name: str) -> Any:
    # Made of the methods that are registered now: each may bring options of its own.
    if name == "ForgetConfig":
        return _config_class(tuple(methods.registry()))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
