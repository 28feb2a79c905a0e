"""A method of forgetting: what it needs of a run, and the objective, edit or wrapping that it is."""

from collections.abc import Callable, Mapping
from copy import copy
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.closed_form import ClosedFormEdit
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.losses import FlowMatchingLoss, Loss
from sa_diffusers.core.objectives import (
    ElasticWeightConsolidation,
    Frozen,
    LowRankChange,
    LowRankEWC,
    Objective,
)
from sa_diffusers.data.concepts.given import check_surrogate
from sa_diffusers.data.picture_groups import PictureGroup
from sa_diffusers.families import CAPABILITIES, Family
from sa_diffusers.io.processes import process_state


Weights = dict[str, nn.Parameter] | dict[str, LowRankChange]  # what is trained, by the weight's name
NEEDS = ("samples", "replay_samples", "surrogate", "concept_samples", "fisher", "frozen", "edit")
EDITOR = "uce"  # whose edit training starts at, where nothing else is said
EVEN = "uniform", "none"  # density and weighting of noise levels
# What a method settles that has none of Selective Amnesia's terms.
ALONE = {"ewc_lambda": 0.0, "replay_weight": 0.0, "surrogate_target": "noise", "start": "model"}


class Context(Protocol):
    """What a method sees of a run."""

    options: Any  # every option, flat, without open ones
    family: Family
    concepts: Concepts
    edited: Concepts  # those of them that a closed-form edit is to forget, the last ones
    prompts: list[str]  # what is kept
    templates: list[list[str]]  # of each concept, prompts with {} in its place
    folder: Path  # of the run
    pictures: Mapping[str, PictureGroup]  # real ones, of models that complete these

    def value(self, need: str) -> Any:
        """What a stage has made, a sample set of its name, the "fisher" or the "edit"; or None."""
        ...


class Method:
    """A way to forget, registered under its name by `register`; nothing outside this package names it.

    Attributes:
        name, title, summary: for --method; for cards and tables; for --help, in a few words.
        Options: a dataclass of its own options, which join the command line, or None.
        requires: capabilities that a family must have.
        fixes: options that it settles, with its values of them; a user's other value is refused.
        trains: whether it minimises an objective; else it edits or wraps.
        shardable, takes_lora: whether it can train weights in parts (see `Objective.attach`), or adapters.
        favours: whether surrogates take the concepts' places; else it leads away, towards nothing in particular.
        favours_nothing: whether the surrogate may be "", which is nothing in particular.
        own_samples: whether what it needs as "surrogate" are the model's samples of the concept itself.
        takes_terms: whether it takes an adversary, and a mixture target where the concept is left open.
        weighs: whether its terms have the options' density and weighting of noise levels.
        Edit: of what class its edits are.
    """

    Options: ClassVar[type | None] = None
    requires: frozenset[str] = frozenset()
    trains: ClassVar[bool] = True
    shardable: ClassVar[bool] = True
    takes_lora: ClassVar[bool] = True
    favours: ClassVar[bool] = True
    favours_nothing: ClassVar[bool] = False
    own_samples: ClassVar[bool] = False
    takes_terms: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    Edit: ClassVar[type[ClosedFormEdit]] = ClosedFormEdit

    def __init__(self, name: str, title: str, summary: str, **fixes: Any):
        self.name, self.title, self.summary, self.fixes = name, title, summary, fixes

    @property
    def completes(self) -> bool:
        """Whether it makes a model forget pictures that it completes, not words or classes."""
        return "completion" in self.requires

    def needs(self, options: Any, concepts: Concepts) -> set[str]:
        """What of NEEDS it takes, given every option and the concepts."""
        return set()

    def check_options(self, options: Any) -> None:
        """Raise ValueError for options that it cannot work with; before anything is loaded."""
        if options.lora_rank is not None and not self.takes_lora:
            raise ValueError(f"lora_rank: adapters are not trained by {self.name}; pass --lora_rank null")
        robust = options.robust_weight or options.robust_conflict or options.robust_embedding
        if not self.takes_terms and (robust or self.trains and options.replay_negative == "mixture"):
            raise ValueError(
                f"{self.name} takes no robust_weight, robust_embedding, robust_conflict or replay_negative mixture; "
                "omit them"
            )
        if not self.weighs and (options.density, options.weighting) != EVEN:
            raise ValueError(f"{self.name} takes noise levels as they come; omit density and weighting")
        kept = options.snapshot_steps or options.strength_sheet or options.strength or options.after
        if options.finish and (not self.trains or options.adapters == "each" or kept):
            raise ValueError(
                "finish, or robust: an edit follows training, and the result is whole weights; omit it, or after, "
                "adapters each, snapshot_steps and strengths, and pass a method that trains"
            )
        late = [step for step in options.snapshot_steps if not 1 <= step <= options.num_train_steps]
        if late or (options.snapshot_steps and not self.trains):
            raise ValueError(
                f"expected snapshot_steps between 1 and num_train_steps {options.num_train_steps}, of a method that "
                f"trains; got {options.snapshot_steps} for {self.name}"
            )

    def check(self, context: Context) -> None:
        """Raise ValueError for a model or concept that it cannot work with; before anything is drawn."""
        require(context.family, self.name, *sorted(self.requires))
        training_loss(context)
        if context.family.can("completion") and not self.completes:
            fitting = " or ".join(name for name, method in registry().items() if method.completes)
            raise ValueError(f"{self.name} forgets words or classes, this model completes pictures; pass {fitting}")
        if self.trains and context.options.finish:
            require(context.family, "robust: an edit" if context.options.robust else "finish: an edit", "text_maps")
            for concept in context.concepts:
                check_surrogate(concept, may_be_empty=True)
            editor(context.options.edit).check(context)

    def training_passes(self, options: Any) -> float:
        """Forward passes that a training step is worth, for a sample of `train_batch_size`."""
        raise NotImplementedError

    def remedies(self, options: Any) -> tuple[str, str]:
        """What to try, by options, where too much of the concept is left, and where too much else was lost."""
        towards = ", a nearer --surrogate" if self.favours else ""
        held = ", a {} --ewc_lambda" if options.ewc_lambda else ""
        replayed = ", a higher --replay_weight" if options.replay_weight else ""
        stronger = f"more --num_train_steps, a higher --learning_rate{held.format('lower')}{towards}"
        return stronger, f"fewer --num_train_steps{held.format('higher')}{replayed}"

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        """What is minimised over `weights`; `frozen` where it needs that."""
        raise NotImplementedError

    def batches(self, context: Context) -> Callable[[int], Batch]:
        """The batch of an optimiser step, as a function of the step."""
        raise NotImplementedError

    def fisher_loss(self, context: Context) -> Loss:
        """What the Fisher is of: the training loss."""
        return context.family.loss

    def edit(self, context: Context) -> dict[str, ClosedFormEdit]:
        """The closed-form edit that the method is, of the maps that read text, by what they read of it."""
        raise NotImplementedError

    def wrap(self, context: Context) -> Family:
        """The family of a pipeline that draws otherwise, of a method that leaves the weights as they are."""
        return context.family


def training_loss(context: Context) -> Loss:
    """The family's, with the options' density and weighting of noise levels.

    Raises ValueError: they are not uniform, and the model is no flow.
    """
    options, loss = context.options, copy(context.family.loss)
    if isinstance(loss, FlowMatchingLoss):
        loss.density, loss.weighting = options.density, options.weighting
    elif (options.density, options.weighting) != EVEN:
        raise ValueError("density and weighting are of models that draw by a velocity; omit them")
    return loss


def require(family: Family | type[Family], what: str, *capabilities: str) -> None:
    """Raise ValueError unless a family can do what something needs."""
    for name in capabilities:
        if name not in family.capabilities:
            kind = " ".join(family.name.split("_"))
            raise ValueError(f"{what} needs a model that {CAPABILITIES[name]}, which a {kind} does not; omit it")


def require_whole_gradients(name: str, options: Any) -> None:
    """Raise ValueError where gradients of a whole batch, which the option `name` compares, are not at hand."""
    if process_state().num_processes * options.gradient_accumulation_steps > 1:
        raise ValueError(f"{name} compares gradients of a whole batch: one process, no accumulation; omit it")
    if options.compile_backend or options.mixed_precision == "fp16":
        raise ValueError(f"{name} takes unscaled gradients of one pass: no compile_backend, and not fp16")


_REGISTRY: dict[str, Method] = {}


def register(*methods: Method) -> None:
    """Make methods known by their names. Raises ValueError where a name is taken."""
    for method in methods:
        if method.name in _REGISTRY:
            raise ValueError(f"there is a method {method.name!r} already ({_REGISTRY[method.name].title})")
        _REGISTRY[method.name] = method


@lru_cache
def _import_methods() -> None:
    package = __name__.rpartition(".")[0]
    import_module(f"{package}.selective_amnesia")
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{package}.{module.name}")  # each registers its own


def registry() -> Mapping[str, Method]:
    """Every method by its name, the default first."""
    _import_methods()
    return _REGISTRY


def get(name: str) -> Method:
    """The method of a name. Raises ValueError where there is none."""
    if name not in registry():
        raise ValueError(f"expected method to be one of {', '.join(registry())}, got {name!r}")
    return _REGISTRY[name]


def editor(name: str | None = None) -> Method:
    """The method whose closed-form edit training may start at or end with; None: the usual one. Raises ValueError for
    others."""
    found = {method.name: method for method in registry().values() if type(method).edit is not Method.edit}
    name = name or EDITOR
    if name not in found:
        raise ValueError(f"expected edit to be one of {', '.join(found)}, got {name!r}")
    return found[name]


def make_ewc(
    context: Context, weights: Weights, frozen: Frozen | None
) -> ElasticWeightConsolidation | LowRankEWC | None:
    """The penalty on changes of what is trained, or None without a Fisher."""
    options, fisher = context.options, context.value("fisher")
    if fisher is None:
        return None
    dtype, device = getattr(torch, options.ewc_dtype), "cpu" if options.ewc_device == "cpu" else None
    if options.lora_rank:
        return LowRankEWC(weights, fisher.tensors, options.ewc_lambda, dtype, device)
    anchor = dict(frozen.named_parameters()) if isinstance(frozen, nn.Module) else None
    return ElasticWeightConsolidation(
        weights, fisher.tensors, options.ewc_lambda, anchor=anchor, fisher_dtype=dtype, device=device
    )
