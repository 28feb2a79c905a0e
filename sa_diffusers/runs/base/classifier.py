"""Train and measure the classifiers that judge generated images: on a folder, coloured digits, labelled images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.objectives import Classification
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.data.digits.captions import ATTRIBUTES, WORDS
from sa_diffusers.data.digits.images import ColoredDigits, load_strokes
from sa_diffusers.data.images import one_split
from sa_diffusers.data.labelled_images import HUB_IDS, LabelledImages, load_labelled_images
from sa_diffusers.data.picture_groups import read_group
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier, ImageClassifier, Score, score_images
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judges.resnet_classifier import ResNetClassifier, saved_sizes
from sa_diffusers.io.configuration import option
from sa_diffusers.runs.base.run_folder import BaseOptions, claimed, flip_half, save_model, told_by
from sa_diffusers.training.loop import infinite_indices, train


# The networks of the Selective Amnesia experiments on these data sets.
ARCHITECTURES = {"mnist": "digit", "digits8x8": "digit", "cifar10": "resnet", "stl10": "resnet"}


@dataclass
class ClassifierConfig(BaseOptions):
    """What `sa-diffusers train-classifier` can be told. Raises ValueError: options that contradict each other."""

    data_dir: str | None = option(
        None, "Images: folder or hub id; null: the data set's own id; digits8x8 needs none.", identity=False
    )
    dataset: Literal["imagefolder", "digits", "mnist", "digits8x8", "cifar10", "stl10", "pictures"] = option(
        "imagefolder",
        "imagefolder (images + metadata.jsonl), digits (MNIST, coloured), mnist (as it is), digits8x8 "
        "(1,797 small ones that come with scikit-learn), cifar10, stl10 (scaled to 64 pixels), or pictures (columns "
        "image and label, scaled to resolution).",
    )
    num_held_out: int | None = option(
        None,
        "Hold out so many of training and test images together; null: the test images. Not for imagefolder, digits.",
        above=0,
    )
    architecture: Literal["attributes", "digit", "resnet"] | None = option(
        None,
        "attributes (any images of 16 pixels or more), digit (the small network of the MNIST experiments, which sees "
        "no colour) or resnet; null: digit for mnist and digits8x8, resnet for cifar10 and stl10, else attributes.",
    )
    pretrained: str | None = option(
        None, "ResNet to start from, hub id or local folder: microsoft/resnet-34; null: from scratch."
    )
    input_size: int | None = option(
        None, "Size in pixels that the resnet scales images to; null: as they are.", above=0
    )
    stem: Literal["imagenet", "small"] = option(
        "imagenet",
        "First layers of a resnet from scratch: imagenet (leaves a quarter of height and width) or small "
        "(leaves all; for images of 32 pixels that are not scaled up).",
    )
    depths: list[int] = option([3, 4, 6, 3], "Blocks of each stage of a resnet from scratch.", above=0)
    hidden_sizes: list[int] = option([64, 128, 256, 512], "Widths of those stages.", above=0)
    attributes: str = option("label", "Columns with the class names, separated by commas (imagefolder only).")
    output_dir: str = option("runs/classifier", "Run folder; `classifier/` in it is the model.", identity=False)
    resolution: int = option(32, "Height and width in pixels that folder images are fitted to.", above=0)
    crop: int | None = option(None, "Take the centre of so many pixels first (dataset pictures); null: all.", above=0)
    num_copies: int = option(1, "Colourings of every digit (dataset digits).", above=0)
    disturb: bool = option(True, "Warp all training images; blur half of them and add noise to those.")
    flip: bool = option(False, "Mirror half of the training images; wrong for digits.")
    save_dtype: Literal["float32", "float16"] = option(
        "float32", "Type of the saved weights, which are the ones that are measured."
    )

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
        if self.num_held_out is not None and self.dataset in ("imagefolder", "digits", "pictures"):
            raise ValueError(
                f"num_held_out: {self.dataset} chooses its own held-out images; expected null, got {self.num_held_out}"
            )


@dataclass
class Examples:
    """Images with the class of every attribute.

    Attributes:
        images: from a list of indices to [B, 3, H, W] in [-1, 1].
        labels: {attribute: [N]}, indices into `classes[attribute]`.
        classes: names of the classes of each attribute.
    """

    images: Callable[[list[int]], Tensor]
    labels: dict[str, Tensor]
    classes: dict[str, list[str]]

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))

    def batch(self, indices: list[int]) -> Batch:
        """What `Classification` asks for: {"sample": images, "labels": {attribute: [B]}}."""
        labels = {name: labels[indices] for name, labels in self.labels.items()}
        return {"sample": self.images(indices), "labels": labels}

    def named(self, index: int) -> dict[str, str]:
        """The class of every attribute of image `index`."""
        return {name: self.classes[name][labels[index]] for name, labels in self.labels.items()}


def load_folder(config: ClassifierConfig) -> tuple[Examples, Examples]:
    """Training and held-out images: the folder's own test split, or a tenth of the images if it has none.

    Raises:
        ValueError: no folder, a missing column of `--attributes`, or a class that held-out images alone have.
    """
    from datasets import load_dataset

    splits = load_dataset("imagefolder", data_dir=config.data_dir, **one_split(config.data_dir))
    if "test" not in splits:
        splits = splits["train"].train_test_split(test_size=0.1, seed=config.seed)
    columns = [name.strip() for name in config.attributes.split(",")]
    missing = set(columns) - set(splits["train"].column_names)
    if missing:
        raise ValueError(f"{config.data_dir} has no column {sorted(missing)}; it has {splits['train'].column_names}")

    def values(rows: Any, column: str) -> list[str]:
        feature = rows.features[column]  # of a folder with one inside it a class, their names are numbered
        return [feature.int2str(value) if hasattr(feature, "int2str") else str(value) for value in rows[column]]

    classes = {name: sorted(set(values(splits["train"], name))) for name in columns}
    for column, known in classes.items():
        if unseen := set(values(splits["test"], column)) - set(known):
            raise ValueError(
                f"{column} {sorted(unseen)} occurs in held-out images only: add images of it for training"
            )

    def examples(rows: Any) -> Examples:
        def image(index: int) -> Tensor:
            # Cropped to a square at the centre before it is scaled: an image is never stretched.
            fitted = ImageOps.fit(rows[index]["image"].convert("RGB"), (config.resolution, config.resolution))
            return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1

        labels = {name: torch.tensor(list(map(known.index, values(rows, name)))) for name, known in classes.items()}
        return Examples(lambda indices: torch.stack([image(index) for index in indices]), labels, classes)

    return examples(splits["train"]), examples(splits["test"])


def load_examples(config: ClassifierConfig) -> tuple[Examples, Examples, dict[str, dict[str, list[str]]] | None]:
    """Examples for training, held-out ones, and the words for their classes as in AttributeClassifier.

    Raises:
        ValueError: as `load_folder` and `load_labelled_images`; as many held-out images as there are, or more.
    """
    if config.data_dir is None and config.dataset in ("imagefolder", "pictures"):
        raise ValueError("expected a folder of images, got none; pass --data_dir, or another --dataset")
    if config.dataset == "imagefolder":
        return *load_folder(config), None
    if config.dataset == "digits":
        cache = Path(config.output_dir) / "data"
        source = config.data_dir or HUB_IDS["mnist"]
        strokes, held_out = (load_strokes(source, split, cache) for split in ("train", "test"))
        words = {name: {c: list(w) for c, w in by_class.items()} for name, by_class in WORDS.items()}
        classes = {name: list(by_class) for name, by_class in words.items()}
        data = ColoredDigits(*strokes, config.num_copies, config.seed), ColoredDigits(*held_out, seed=config.seed)
        return *(_coloured(digits, classes) for digits in data), words
    if config.dataset == "pictures":
        group = read_group(config.data_dir, "data_dir", config.resolution, crop=config.crop)
        sets = [group.train, group.test]
    elif config.num_held_out is None:
        sets = [load_labelled_images(config.dataset, config.data_dir, split) for split in ("train", "test")]
    else:
        sets = hold_out(load_labelled_images(config.dataset, config.data_dir, "all"), config.num_held_out, config.seed)
    attribute = "digit" if config.dataset in ("mnist", "digits8x8") else "class"
    words = {"digit": digit_words(sets[0].names)} if attribute == "digit" else None
    return *(_all_at_once(data, attribute) for data in sets), words


def hold_out(data: LabelledImages, count: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """All images but `count` of them, and those, drawn at random. Raises ValueError: nothing held out, or left."""
    if not 0 < count < len(data):
        raise ValueError(f"expected num_held_out from 1 to {len(data) - 1}, fewer than there are images, got {count}")
    order = torch.randperm(len(data), generator=seeded(seed, "held out"))
    return data.take(order[count:]), data.take(order[:count])


def digit_words(names: Sequence[str]) -> dict[str, list[str]]:
    """The words for each class of digits: {"7": ["7", "seven"]}; another class has its name only."""
    spoken = {str(number): word for number, word in enumerate(ATTRIBUTES["digit"])}
    return {name: [name, spoken[name]] if name in spoken else [name] for name in names}


def _coloured(data: ColoredDigits, classes: dict[str, list[str]]) -> Examples:
    rows = [data.attributes(index) for index in range(len(data))]
    labels = {name: torch.tensor([known.index(row[name]) for row in rows]) for name, known in classes.items()}
    return Examples(lambda indices: torch.stack([data.image(index) for index in indices]), labels, classes)


def _all_at_once(data: LabelledImages, attribute: str) -> Examples:
    def images(indices: list[int]) -> Tensor:
        return (data.sample(indices) * 2 - 1).expand(-1, 3, -1, -1)  # grey: three equal channels

    return Examples(images, {attribute: data.labels}, {attribute: data.names})


def make_classifier(examples: Examples, words: dict | None, config: ClassifierConfig) -> ImageClassifier:
    """An untrained classifier for images of this size.

    Raises:
        OSError: the ResNet to start from cannot be read.
        ValueError: the architecture is not for images as small; as ResNetClassifier.
    """
    size = examples.images([0]).shape[-1]
    torch.manual_seed(derive_seed(config.seed, "classifier"))
    if config.architecture == "resnet":
        sizes = {"image_size": size, "input_size": config.input_size}
        if config.pretrained is not None:
            return ResNetClassifier.from_resnet(config.pretrained, examples.classes, words=words, **sizes)
        sizes |= {"depths": config.depths, "hidden_sizes": config.hidden_sizes, "stem": config.stem}
        return ResNetClassifier(examples.classes, words, embedding_size=config.hidden_sizes[0], **sizes)
    if config.architecture == "digit":
        # A kernel of 5 without padding, the authors' for 28 pixels, leaves nothing of 8.
        convolutions = {"kernel_size": 5, "padding": 0} if size >= 16 else {"kernel_size": 3, "padding": 1}
        return DigitClassifier(examples.classes, words, image_size=size, **convolutions)
    if size < 16:
        raise ValueError(f"the architecture attributes needs 16 pixels or more, got images of {size}; use digit")
    return AttributeClassifier(examples.classes, words, image_size=size)


def training_batch(examples: Examples, config: ClassifierConfig, step: int) -> Batch:
    """The batch of optimiser step `step`, as `Examples.batch`, with the flips of the configuration."""
    order_seed = derive_seed(config.seed, "order")
    batch = examples.batch(infinite_indices(len(examples), config.train_batch_size, step, order_seed))
    if config.flip:
        batch["sample"] = flip_half(batch["sample"], seeded(config.seed, "flip", step))
    return batch


def train_classifier(examples: Examples, words: dict | None, config: ClassifierConfig) -> ImageClassifier:
    """Train a classifier of every attribute of the images; `words` as in AttributeClassifier. Raises as `claimed`."""
    classifier = make_classifier(examples, words, config)
    with claimed(config, told_by(len(examples), lambda index: examples.images([index]))) as output_dir:
        train(
            classifier,
            Classification(config.disturb),
            lambda step: training_batch(examples, config, step),
            config,
            seed=derive_seed(config.seed, "classifier"),
            checkpoint_dir=output_dir / "checkpoints",
            log_dir=output_dir / "logs",
            description="classifier",
        )
    return classifier


def train_and_save_classifier(config: ClassifierConfig) -> dict[str, dict[str, Score]]:
    """Train a classifier, save it in `<output_dir>/classifier`; {attribute: {class: Score}} on held-out images."""
    if config.pretrained is not None:
        saved_sizes(config.pretrained)  # fails where there is no such model, before the images are read
    examples, held_out, words = load_examples(config)
    classifier = train_classifier(examples, words, config)
    if config.save_dtype == "float16":
        classifier = classifier.half().float()  # measured with the rounded weights, which are the ones that are saved
    indices = list(range(len(held_out)))
    scores = score_images(classifier, held_out.images(indices), [held_out.named(index) for index in indices])
    overall = {attribute: Score.total_of(by_class.values()).share for attribute, by_class in scores.items()}
    classifier.register_to_config(accuracy={attribute: round(share, 4) for attribute, share in overall.items()})
    save_model(classifier, Path(config.output_dir) / "classifier", config.save_dtype)
    return scores
