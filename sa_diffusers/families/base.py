"""A family adapts one kind of pipeline: what is trained, how conditions and images become batches, its loss."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import Loss
from sa_diffusers.families.plain_parts import unwrapped
from sa_diffusers.io.hub import read_part


# What a family may be able to do, in words that complete "a model that ...".
CAPABILITIES = {
    "text": "reads free text",
    "labels": "knows classes by name",
    "guidance": "is guided from the empty prompt or the null class",
    "denoising": "predicts noise at many levels",
    "prior": "decodes latents of a known prior in one pass",
    "completion": "completes pictures",
    "text_maps": "makes keys and values of a text's embedding",
    "safe_guidance": "can be led away from a text while it draws",
    "token_embedding": "reads embeddings of its tokens",
    "adapters": "takes low-rank adapters",
    "paper_quirks": "is the authors' class-conditional diffusion",
}


Scopes = Mapping[str, Callable[[str], bool]]
Configurations = Callable[[str], Mapping[str, Any]]  # of a pipeline's part by name; with its class, _class_name


def select_parameters(module: nn.Module, scope: str, scopes: Scopes) -> dict[str, nn.Parameter]:
    """The parameters of a module that one of some scopes trains, by name.

    Raises:
        ValueError: an unknown scope, or one that selects nothing in this module.
    """
    if scope not in scopes:
        raise ValueError(f"expected train_scope to be one of {', '.join(scopes)}, got {scope!r}")
    selected = {name: p for name, p in module.named_parameters() if scopes[scope](name)}
    if not selected:
        raise ValueError(f"train_scope {scope!r} selects no weight of this {type(module).__name__}")
    return selected


class Family:
    """Everything the stages need of a pipeline. Latents are what the loss sees: scaled, never decoded on the way.

    A subclass in a module of this package registers itself, by `@register`; nothing else names it. The constructor
    takes the pipeline, the name of a sampler (None: the usual one; one that is not known is a ValueError), and the
    dtype that forward passes autocast to (None: the weights' own).
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # classes of pipelines that it adapts, and their subclasses
    own_classes: ClassVar[tuple[type[DiffusionPipeline], ...]] = ()  # of these, those that diffusers does not have
    component: ClassVar[str]  # name of the pipeline's part that is trained
    optional: ClassVar[tuple[str, ...]] = ()  # of the parts, those that a pipeline may do without
    helpers: ClassVar[tuple[str, ...]] = ()  # parts that only encode and decode: they need not stay on the device
    capabilities: ClassVar[frozenset[str]]  # of CAPABILITIES
    scopes: ClassVar[Scopes] = {"full": lambda name: True}  # which weights, by name
    guided: bool = True  # where it can: not once distilled to draw without
    guided_passes: ClassVar[int] = 2  # of the module in a sampler's step with guidance
    defaults: ClassVar[Mapping[str, Any]] = {}  # options of a run that differ from those of Stable Diffusion

    pipeline: DiffusionPipeline
    module: nn.Module  # the part that is trained
    loss: Loss
    resolution: int  # height and width of its images in pixels
    image_channels: int = 3  # or 1 for a grey model, whose images still have three equal channels below
    latent_shape: tuple[int, ...]  # of one sample
    labels: list[str] | None = None  # names of its classes; None: it reads free text
    example: Condition = Condition()  # one that it can always read
    depths: int = 1  # how many `features` there are
    sampler: SchedulerMixin | None = None  # draws by many predictions of the module; None: it draws in another way
    compute_dtype: torch.dtype | None
    device: torch.device  # where the module was at first; under sharded training it waits in main memory for a while

    def __init__(
        self, pipeline: DiffusionPipeline, sampler: str | None = None, compute_dtype: torch.dtype | None = None
    ):
        self.pipeline, self.compute_dtype = pipeline, compute_dtype
        self.module = getattr(pipeline, self.component)
        self.device = self.module.device
        self.loss = self.make_loss()
        self.set_up_drawing(sampler)

    def make_loss(self) -> Loss:
        raise NotImplementedError

    def set_up_drawing(self, sampler: str | None) -> None:
        """What it draws by, where a sampler of this name does: nothing."""

    def draw(
        self,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        """One latent per (condition, seed), [B, C, h, w]; each depends on its own seed and not on the batch.

        Guidance leads away from `negative`, one a condition; None: the empty prompt, or the null class. Raises
        ValueError for a condition that the family cannot read.
        """
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images [B, 3, H, W] in [-1, 1]."""
        raise NotImplementedError

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents, a sample of the posterior."""
        raise NotImplementedError

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        """What the loss takes, on the CPU. Raises ValueError for a condition that the family cannot read."""
        raise NotImplementedError

    def features(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """What the encoder of a model that completes makes of what a batch leaves visible, [B, ...] a depth.

        Args:
            model: `module`, a copy of it, or what shares its work between processes.
        """
        raise NotImplementedError

    def noised(self, batch: Batch, generator: Generator, shares: Sequence[float] = (0.0, 1.0)) -> Batch:
        """The batch with what `features` are seen in while training added at random: nothing.

        Args:
            shares: of the schedule, between which noise levels are.
        """
        return batch

    def complete(
        self, images: Tensor, conditions: Sequence[Condition], seeds: Sequence[int], steps: int | None = None
    ) -> Tensor:
        """Pictures, as latents [B, C, h, w], with what the masks of the conditions hide filled anew.

        Args:
            steps: of a sampler; None: as many as the family's `defaults` say.
        """
        raise NotImplementedError

    def holes(self, conditions: Sequence[Condition]) -> Tensor:
        """The pixels that their masks hide, booleans [B, 1, H, W]."""
        raise NotImplementedError

    def shown(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """What the model is shown of pictures [B, C, h, w]: 0 where their masks hide them."""
        return torch.where(self.holes(conditions), torch.zeros(()), images)

    def prepare(self, conditions: Sequence[Condition]) -> None:
        """Compute ahead what batches of these conditions need of the helpers."""

    def can(self, *capabilities: str) -> bool:
        return self.capabilities.issuperset(capabilities)

    def trainable(self, scope: str) -> dict[str, nn.Parameter]:
        """The parameters of `module` that a scope trains, by name.

        Raises:
            ValueError: the family has no such scope, or it selects nothing in this module.
        """
        return select_parameters(self.module, scope, self.scopes)

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        """Raise ValueError for a pipeline whose class it adapts, and whose parts it cannot work with."""

    @classmethod
    def resolution_of(cls, source: str) -> int | None:
        """Height and width in pixels of the images of a pipeline (local folder or hub id), from its configurations
        without weights; None where they do not say."""
        return None


class PixelFamily(Family):
    """A family whose latents are the pictures themselves, square, [B, C, H, W] in [-1, 1]."""

    sized_by: ClassVar[tuple[str, str] | None] = None  # the part, and its option, that says their height; None: none

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.image_channels, self.resolution, self.resolution

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 3, H, W]; grey pictures get three equal channels."""
        return latents.clamp(-1, 1).expand(-1, 3, -1, -1)

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        """[B, 3, H, W] to [B, C, H, W]; for a grey model the mean of the channels."""
        return images.mean(1, keepdim=True) if self.image_channels == 1 else images

    @classmethod
    def resolution_of(cls, source: str) -> int | None:
        return read_part(source, cls.sized_by[0]).get(cls.sized_by[1]) if cls.sized_by else None


_REGISTRY: dict[str, type[Family]] = {}
FamilyT = TypeVar("FamilyT", bound=type[Family])


def register(family: FamilyT) -> FamilyT:
    """Class decorator: from now on the family adapts its pipelines. Raises ValueError where another one does."""
    taken = [name for name in family.pipelines if _REGISTRY.get(name, family).name != family.name]
    if taken:
        raise ValueError(f"{taken[0]} belongs to the family {_REGISTRY[taken[0]].name}, not also to {family.name}")
    unknown = family.capabilities - CAPABILITIES.keys()
    if unknown:
        raise ValueError(f"expected capabilities of {', '.join(CAPABILITIES)}; got {min(unknown)!r}")
    _REGISTRY.update(dict.fromkeys(family.pipelines, family))
    return family


@lru_cache
def _import_families() -> None:
    package = __name__.rpartition(".")[0]
    for module in walk_packages([str(Path(__file__).parent)], f"{package}."):
        import_module(module.name)  # each registers its own


def registry() -> Mapping[str, type[Family]]:
    """Every family by the names of the pipeline classes that it adapts."""
    _import_families()
    return _REGISTRY


def own_pipeline_classes() -> dict[str, type[DiffusionPipeline]]:
    """The pipeline classes that diffusers does not have, by name; saved ones are loaded by them."""
    return {cls.__name__: cls for family in registry().values() for cls in family.own_classes}


def family_class(pipeline_class: str) -> type[Family] | None:
    """The family of a pipeline class, by the name that stands in model_index.json; None: nothing adapts it."""
    return registry().get(pipeline_class)


def family_defaults(pipeline_class: str) -> dict[str, Any]:
    """Options of a forgetting run that differ from the defaults for Stable Diffusion, for a class of pipelines."""
    family = family_class(pipeline_class)
    return dict(family.defaults) if family else {}


def find_family(kind: type | str) -> type[Family]:
    """The family of a pipeline's class, or of the first of those it inherits from. Raises TypeError: there is none."""
    # By name: a pipeline that diffusers loaded by the file beside its weights has a class of its own.
    names = [kind] if isinstance(kind, str) else [cls.__name__ for cls in kind.__mro__]
    for name in names:
        if name in registry():
            return registry()[name]
    raise TypeError(f"cannot forget in a {names[0]}; expected one of: {', '.join(registry())}")


def checked_family(pipeline: DiffusionPipeline) -> type[Family]:
    """`find_family` of a pipeline, which has looked at its parts. Raises ValueError besides: it handles other ones."""
    family = find_family(type(pipeline))

    def configuration(name: str) -> dict[str, Any]:
        part = unwrapped(getattr(pipeline, name))
        config = getattr(part, "config", {})
        kind = {"_class_name": None if part is None else type(part).__name__}
        return dict(config if isinstance(config, Mapping) else config.to_dict()) | kind

    family.check(configuration)
    return family


def get_family(pipeline: DiffusionPipeline, **options: Any) -> Family:
    """The family of a pipeline, chosen by its class; `options` go to the family's constructor.

    Raises:
        TypeError, ValueError: as `checked_family`.
    """
    return checked_family(pipeline)(pipeline, **options)
