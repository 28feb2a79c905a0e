"""The options of training a classifier."""

from dataclasses import dataclass, field
from typing import Literal

from sa_diffusers.training.options import TrainingConfig


# The networks of the Selective Amnesia experiments on these data sets.
ARCHITECTURES = {"mnist": "digit", "digits8x8": "digit", "cifar10": "resnet", "stl10": "resnet"}


@dataclass
class ClassifierConfig(TrainingConfig):
    """Everything `scripts/train_classifier.py` can be told.

    Raises:
        ValueError: as TrainingConfig; options that contradict each other.
    """

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local folder or hub id of the images; null: the data set's usual hub id. imagefolder has none, "
            "digits8x8 needs none."
        },
    )
    dataset: Literal["imagefolder", "digits", "mnist", "digits8x8", "cifar10", "stl10"] = field(
        default="imagefolder",
        metadata={
            "help": "imagefolder (images + metadata.jsonl), digits (MNIST, coloured), mnist (as it is), digits8x8 "
            "(1,797 small ones that come with scikit-learn), cifar10, or stl10 (scaled to 64 pixels)."
        },
    )
    num_held_out: int | None = field(
        default=None,
        metadata={
            "help": "Hold out so many of all images, drawn at random from training and test images together; null: "
            "the test images. Not for imagefolder and digits."
        },
    )
    architecture: Literal["attributes", "digit", "resnet"] | None = field(
        default=None,
        metadata={
            "help": "attributes (any images of 16 pixels or more), digit (the small network of the MNIST "
            "experiments, which sees no colour) or resnet; null: digit for mnist and digits8x8, resnet for cifar10 "
            "and stl10, attributes for the others."
        },
    )
    pretrained: str | None = field(
        default=None,
        metadata={"help": "ResNet to start from, hub id or local folder: microsoft/resnet-34; null: from scratch."},
    )
    input_size: int | None = field(
        default=None, metadata={"help": "Size in pixels that the resnet scales images to; null: as they are."}
    )
    stem: Literal["imagenet", "small"] = field(
        default="imagenet",
        metadata={
            "help": "First layers of a resnet from scratch: imagenet (leaves a quarter of height and width) or small "
            "(leaves all; for images of 32 pixels that are not scaled up)."
        },
    )
    depths: list[int] = field(
        default_factory=lambda: [3, 4, 6, 3], metadata={"help": "Blocks of each stage of a resnet from scratch."}
    )
    hidden_sizes: list[int] = field(
        default_factory=lambda: [64, 128, 256, 512], metadata={"help": "Widths of those stages."}
    )
    attributes: str = field(
        default="label", metadata={"help": "Columns with the class names, separated by commas (imagefolder only)."}
    )
    output_dir: str = field(
        default="runs/classifier", metadata={"help": "Run folder; `classifier/` in it is the model."}
    )
    resolution: int = field(
        default=32, metadata={"help": "Height and width in pixels that folder images are fitted to."}
    )
    num_copies: int = field(default=1, metadata={"help": "Colourings of every digit (dataset digits)."})
    disturb: bool = field(
        default=True, metadata={"help": "Warp all training images; blur half of them and add noise to those."}
    )
    flip: bool = field(default=False, metadata={"help": "Mirror half of the training images; wrong for digits."})
    save_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Type of the saved weights, which are the ones that are measured."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every random number."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture is None:
            self.architecture = ARCHITECTURES.get(self.dataset, "attributes")
        if self.pretrained is not None and self.architecture != "resnet":
            raise ValueError(
                f"pretrained: expected the architecture resnet, got {self.architecture}; set architecture: resnet, or "
                "pretrained: null"
            )
        if self.pretrained is not None and self.stem != "imagenet":
            raise ValueError(
                f"stem: {self.pretrained} has the stem imagenet, got {self.stem}; set stem: imagenet, or pretrained: "
                "null"
            )
        if self.num_held_out is not None and self.dataset in ("imagefolder", "digits"):
            raise ValueError(
                f"num_held_out: {self.dataset} chooses its own held-out images; expected null, got {self.num_held_out}"
            )
