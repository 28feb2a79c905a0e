"""Train models that complete pictures, from pictures with holes of many kinds; here a masked autoencoder."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from diffusers import DiffusionPipeline

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, hidden_patches
from sa_diffusers.core.objectives import Likelihood
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.data.picture_groups import read_group
from sa_diffusers.families import Family, get_family
from sa_diffusers.families.architectures import build_masked_autoencoder
from sa_diffusers.io.configuration import option
from sa_diffusers.io.processes import process_state
from sa_diffusers.runs.base.labelled import LabelledBaseConfig
from sa_diffusers.runs.base.run_folder import flip_half, told_by, train_pipeline
from sa_diffusers.training.loop import infinite_indices


PERCENT = 100  # rows of which a hole's number is a whole one; a model's own are looked at by `HoleBatches`


@dataclass
class CompletionConfig(LabelledBaseConfig):
    """What every model that completes pictures can be told. Raises ValueError: no such holes, or another data_dir."""

    degradations: ClassVar[tuple[str, ...]] = ()  # that stand among the holes

    dataset: Literal["digits8x8", "mnist", "cifar10", "stl10", "pictures"] = option(
        "digits8x8", "Data set; pictures: any folder or hub data set of pictures, named by data_dir."
    )
    image_size: int = option(32, "Height and width in pixels that pictures are scaled to.", above=0)
    crop: int | None = option(None, "Take the centre of so many pixels first; null: the largest square.", above=0)
    holes: list[str] = option(
        ["half=10", "quarter=3", "ring=3", "left=1", "right=1", "top=1", "bottom=1", "random=3"],
        "Kinds of holes, each with how often it comes.",
    )
    flip: bool = option(False, "Mirror half of the pictures; wrong for digits.")
    save_dtype: Literal["float32", "float16"] = option("float32", "Precision of the files.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset == "pictures") != (self.data_dir is not None) and self.dataset in ("pictures", "digits8x8"):
            raise ValueError(f"expected a data_dir with dataset pictures, none with digits8x8; got {self.data_dir!r}")
        for hole in self.holes:
            name, _, count = hole.partition("=")
            if not count.isdigit():
                raise ValueError(f"expected holes such as half=10, got {hole!r}")
            if name not in self.degradations:
                hidden_patches(name, PERCENT)
        if not any(hole.rpartition("=")[2].strip("0") for hole in self.holes):
            raise ValueError(f"expected holes of which one comes at all, got {', '.join(self.holes) or 'none'}")
        if self.crop is not None and self.dataset == "digits8x8":
            raise ValueError(f"crop {self.crop}: the pictures of digits8x8 are taken whole; omit it")


@dataclass
class MaskedAutoencoderConfig(CompletionConfig):
    """Everything `sa-diffusers train-base` can be told of a masked autoencoder."""

    family: Literal["masked_autoencoder"] = option("masked_autoencoder", "What to train.")
    patch_size: int = option(4, "Height and width of a patch in pixels.", above=0)
    hidden_size: int = option(96, "Width of the encoder.", above=0)
    num_layers: int = option(4, "Layers of the encoder.", above=0)
    num_heads: int = option(4, "Heads of every layer.", above=0)
    decoder_hidden_size: int = option(64, "Width of the decoder.", above=0)
    decoder_num_layers: int = option(2, "Layers of the decoder.", above=0)
    initializer_range: float = option(0.1, "Spread of the weights at first; 0.02 suits wide models.", above=0)


class HoleBatches:
    """Batches of pictures with holes of one kind; a function of the step.

    Raises:
        ValueError: holes of no kind that the model knows, or that hide nothing or everything of its pictures.
    """

    def __init__(self, family: Family, data: LabelledImages, config: CompletionConfig):
        self.family, self.data, self.config = family, data, config
        pairs = (hole.split("=") for hole in config.holes)
        self.kinds = [name for name, count in pairs for _ in range(int(count))]
        family.holes([Condition(mask=kind) for kind in dict.fromkeys(self.kinds)])  # or refused

    def __call__(self, step: int) -> Batch:
        config, generator = self.config, seeded(self.config.seed, "holes", step)
        indices = infinite_indices(len(self.data), config.train_batch_size, step, derive_seed(config.seed, "order"))
        images = 2 * self.data.sample(indices) - 1
        kind = self.kinds[torch.randint(len(self.kinds), (), generator=generator)]
        if config.flip:
            images = flip_half(images, generator)
        seeds = torch.randint(2**31, (len(images),), generator=generator).tolist()
        return self.family.batch(images, [Condition(mask=f"{kind} {s}" if kind == "random" else kind) for s in seeds])


def read_pictures(config: CompletionConfig) -> LabelledImages:
    """What a configuration trains on. Raises ValueError as `read_group`, and for a class that there is not."""
    group = read_group(config.data_dir or config.dataset, "dataset", config.image_size, crop=config.crop)
    return (group.train + group.test if config.split == "all" else group.train).without(config.exclude_classes)


def train_masked_autoencoder(config: MaskedAutoencoderConfig) -> DiffusionPipeline:
    """Train the model that `<output_dir>/pipeline` then holds; an interrupted run goes on.

    Raises:
        RunFolderBusy, StageMismatch: as `claimed`. ValueError: pictures or an architecture that do not fit.
    """
    data = read_pictures(config)
    pipeline = build_masked_autoencoder(config, data.images.shape[1], config.seed)
    family = get_family(pipeline.to(process_state().device))
    for name, weight in family.module.named_parameters():
        weight.requires_grad_(family.scopes["full"](name))
    batches = HoleBatches(family, data, config)
    pictures = told_by(len(data), data.images.__getitem__)
    return train_pipeline(family, Likelihood(family.loss), batches, config, pictures, description="masked autoencoder")
