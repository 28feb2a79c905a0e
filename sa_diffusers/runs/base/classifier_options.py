"""The options of training a classifier."""

from dataclasses import dataclass
from typing import Literal

from sa_diffusers.io.configuration import option
from sa_diffusers.training.options import TrainingConfig


# The networks of the Selective Amnesia experiments on these data sets.
ARCHITECTURES = {"mnist": "digit", "digits8x8": "digit", "cifar10": "resnet", "stl10": "resnet"}


@dataclass
class ClassifierConfig(TrainingConfig):
    """Everything `scripts/train_classifier.py` can be told.

    Raises:
        ValueError: as TrainingConfig; options that contradict each other.
    """

    data_dir: str | None = option(
        None,
        "Local folder or hub id of the images; null: the data set's usual hub id. imagefolder has none, "
        "digits8x8 needs none.",
        identity=False,
    )
    dataset: Literal["imagefolder", "digits", "mnist", "digits8x8", "cifar10", "stl10"] = option(
        "imagefolder",
        "imagefolder (images + metadata.jsonl), digits (MNIST, coloured), mnist (as it is), digits8x8 "
        "(1,797 small ones that come with scikit-learn), cifar10, or stl10 (scaled to 64 pixels).",
    )
    num_held_out: int | None = option(
        None,
        "Hold out so many of all images, drawn at random from training and test images together; null: "
        "the test images. Not for imagefolder and digits.",
    )
    architecture: Literal["attributes", "digit", "resnet"] | None = option(
        None,
        "attributes (any images of 16 pixels or more), digit (the small network of the MNIST "
        "experiments, which sees no colour) or resnet; null: digit for mnist and digits8x8, resnet for cifar10 "
        "and stl10, attributes for the others.",
    )
    pretrained: str | None = option(
        None, "ResNet to start from, hub id or local folder: microsoft/resnet-34; null: from scratch."
    )
    input_size: int | None = option(None, "Size in pixels that the resnet scales images to; null: as they are.")
    stem: Literal["imagenet", "small"] = option(
        "imagenet",
        "First layers of a resnet from scratch: imagenet (leaves a quarter of height and width) or small "
        "(leaves all; for images of 32 pixels that are not scaled up).",
    )
    depths: list[int] = option([3, 4, 6, 3], "Blocks of each stage of a resnet from scratch.")
    hidden_sizes: list[int] = option([64, 128, 256, 512], "Widths of those stages.")
    attributes: str = option("label", "Columns with the class names, separated by commas (imagefolder only).")
    output_dir: str = option("runs/classifier", "Run folder; `classifier/` in it is the model.", identity=False)
    resolution: int = option(32, "Height and width in pixels that folder images are fitted to.")
    num_copies: int = option(1, "Colourings of every digit (dataset digits).")
    disturb: bool = option(True, "Warp all training images; blur half of them and add noise to those.")
    flip: bool = option(False, "Mirror half of the training images; wrong for digits.")
    save_dtype: Literal["float32", "float16"] = option(
        "float32", "Type of the saved weights, which are the ones that are measured."
    )
    seed: int = option(0, "Seed of every random number.")

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
