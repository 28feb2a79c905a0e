"""Train and measure the classifiers that judge generated images: on a folder, on MNIST, on scikit-learn's digits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sa_diffusers.artifacts import atomic_path
from sa_diffusers.digits import ATTRIBUTES, WORDS, ColoredDigits, load_strokes
from sa_diffusers.evaluation.classifier import AttributeClassifier, ImageClassifier, Score, score_images
from sa_diffusers.evaluation.digit_classifier import DigitClassifier
from sa_diffusers.labelled_images import LabelledImages, load_labelled_images
from sa_diffusers.objectives import Classification, NestedBatch
from sa_diffusers.processes import process_state
from sa_diffusers.seeding import derive_seed
from sa_diffusers.training import TrainingConfig, infinite_indices, train


@dataclass
class ClassifierConfig(TrainingConfig):
    """Everything `scripts/train_classifier.py` can be told."""

    data_dir: str = field(
        default="ylecun/mnist", metadata={"help": "Hub id or local folder of the images; digits8x8 needs none."}
    )
    dataset: Literal["imagefolder", "digits", "mnist", "digits8x8"] = field(
        default="imagefolder",
        metadata={
            "help": "imagefolder (images + metadata.jsonl), digits (MNIST, coloured), mnist (as it is), or digits8x8 "
            "(1,797 small ones that come with scikit-learn)."
        },
    )
    architecture: Literal["attributes", "digit"] | None = field(
        default=None,
        metadata={
            "help": "attributes (any images of 16 pixels or more) or digit (the small network of the MNIST "
            "experiments, which sees no colour); null: digit for mnist and digits8x8, attributes for the others."
        },
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
    save_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Type of the saved weights, which are the ones that are measured."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every random number."})


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

    def batch(self, indices: list[int]) -> NestedBatch:
        """What `Classification` asks for: {"sample": images, "labels": {attribute: [B]}}."""
        return {
            "sample": self.images(indices),
            "labels": {name: labels[indices] for name, labels in self.labels.items()},
        }

    def named(self, index: int) -> dict[str, str]:
        """The class of every attribute of image `index`."""
        return {name: self.classes[name][labels[index]] for name, labels in self.labels.items()}


class LabelledFolder:
    """Images [3, H, W] in [-1, 1] and class names, of a data set with an `image` column and one for each attribute."""

    def __init__(self, rows, columns: list[str], resolution: int):
        self.rows, self.resolution = rows, resolution
        self.labels = [{name: str(row[name]) for name in columns} for row in rows.select_columns(columns)]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        # Cropped to a square at the centre before it is scaled: an image is never stretched.
        fitted = ImageOps.fit(self.rows[index]["image"].convert("RGB"), (self.resolution, self.resolution))
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1

    def attributes(self, index: int) -> dict[str, str]:
        return self.labels[index]


def load_folder(config: ClassifierConfig) -> tuple[LabelledFolder, LabelledFolder]:
    """Training and held-out images: the folder's own test split, or a tenth of the images if it has none.

    Raises:
        ValueError: a column of `--attributes` is missing, or a class occurs in held-out images only.
    """
    from datasets import load_dataset

    splits = load_dataset("imagefolder", data_dir=config.data_dir)
    if "test" not in splits:
        splits = splits["train"].train_test_split(test_size=0.1, seed=config.seed)
    columns = [name.strip() for name in config.attributes.split(",")]
    missing = set(columns) - set(splits["train"].column_names)
    if missing:
        raise ValueError(f"{config.data_dir} has no column {sorted(missing)}; it has {splits['train'].column_names}")
    for column in columns:
        unseen = set(splits["test"][column]) - set(splits["train"][column])
        if unseen:
            raise ValueError(
                f"{column} {sorted(unseen)} occurs in held-out images only: add images of it for training"
            )
    return tuple(LabelledFolder(splits[split], columns, config.resolution) for split in ("train", "test"))


def load_examples(config: ClassifierConfig) -> tuple[Examples, Examples, dict[str, dict[str, list[str]]] | None]:
    """Examples for training, held-out ones, and the words for their classes as in AttributeClassifier.

    Raises:
        ValueError: as `load_folder` and `load_labelled_images`.
    """
    if config.dataset == "imagefolder":
        folders = load_folder(config)
        labels = [folders[0].attributes(index) for index in range(len(folders[0]))]
        classes = {name: sorted({row[name] for row in labels}) for name in labels[0]}
        return *(_one_by_one(folder, classes) for folder in folders), None
    if config.dataset == "digits":
        cache = Path(config.output_dir) / "data"
        strokes, held_out = (load_strokes(config.data_dir, split, cache) for split in ("train", "test"))
        words = {name: {c: list(w) for c, w in by_class.items()} for name, by_class in WORDS.items()}
        classes = {name: list(by_class) for name, by_class in words.items()}
        data = ColoredDigits(*strokes, config.num_copies, config.seed), ColoredDigits(*held_out, seed=config.seed)
        return *(_one_by_one(digits, classes) for digits in data), words
    sets = [load_labelled_images(config.dataset, config.data_dir, split) for split in ("train", "test")]
    return *map(_all_at_once, sets), {"digit": digit_words(sets[0].names)}


def digit_words(names: Sequence[str]) -> dict[str, list[str]]:
    """The words for each class of digits: {"7": ["7", "seven"]}; another class has its name only."""
    spoken = {str(number): word for number, word in enumerate(ATTRIBUTES["digit"])}
    return {name: [name, spoken[name]] if name in spoken else [name] for name in names}


def _one_by_one(data: LabelledFolder | ColoredDigits, classes: dict[str, list[str]]) -> Examples:
    rows = [data.attributes(index) for index in range(len(data))]
    labels = {name: torch.tensor([known.index(row[name]) for row in rows]) for name, known in classes.items()}
    return Examples(lambda indices: torch.stack([data.image(index) for index in indices]), labels, classes)


def _all_at_once(data: LabelledImages) -> Examples:
    def images(indices: list[int]) -> Tensor:
        return (data.sample(indices) * 2 - 1).expand(-1, 3, -1, -1)  # grey: three equal channels

    return Examples(images, {"digit": data.labels}, {"digit": data.names})


class Undisturbed(Classification):
    """Cross-entropy on the images as they are, without the cost of warping them by nothing."""

    def draw(self, batch: NestedBatch, generator: Generator) -> NestedBatch:
        return batch

    def __call__(self, model: nn.Module, batch: NestedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch["sample"])
        parts = {f"{name}_loss": F.cross_entropy(logits[name], labels) for name, labels in batch["labels"].items()}
        return torch.stack([*parts.values()]).sum(), {name: part.detach() for name, part in parts.items()}


def make_classifier(examples: Examples, words: dict | None, config: ClassifierConfig) -> ImageClassifier:
    """An untrained classifier for images of this size.

    Raises:
        ValueError: the architecture is not for images as small.
    """
    size = examples.images([0]).shape[-1]
    architecture = config.architecture or ("digit" if config.dataset in ("mnist", "digits8x8") else "attributes")
    torch.manual_seed(derive_seed(config.seed, "classifier"))
    if architecture == "digit":
        # A kernel of 5 without padding, the authors' for 28 pixels, leaves nothing of 8.
        convolutions = {"kernel_size": 5, "padding": 0} if size >= 16 else {"kernel_size": 3, "padding": 1}
        return DigitClassifier(examples.classes, words, image_size=size, **convolutions)
    if size < 16:
        raise ValueError(f"the architecture attributes needs 16 pixels or more, got images of {size}; use digit")
    return AttributeClassifier(examples.classes, words, image_size=size)


def train_classifier(examples: Examples, words: dict | None, config: ClassifierConfig) -> ImageClassifier:
    """Train a classifier of every attribute that the images have; `words` as in AttributeClassifier."""
    classifier = make_classifier(examples, words, config)
    order_seed = derive_seed(config.seed, "order")
    train(
        classifier,
        Classification() if config.disturb else Undisturbed(),
        lambda step: examples.batch(infinite_indices(len(examples), config.train_batch_size, step, order_seed)),
        config,
        seed=derive_seed(config.seed, "classifier"),
        checkpoint_dir=Path(config.output_dir) / "checkpoints",
        description="classifier",
    )
    return classifier


def measure_classifier(classifier: ImageClassifier, held_out: Examples) -> dict[str, dict[str, Score]]:
    """{attribute: {class: Score}} on all held-out examples."""
    indices = range(len(held_out))
    return score_images(classifier, held_out.images(list(indices)), [held_out.named(index) for index in indices])


def train_and_save_classifier(config: ClassifierConfig) -> dict[str, dict[str, Score]]:
    """Train a classifier, measure it on held-out images, save it in `<output_dir>/classifier` with its accuracy."""
    examples, held_out, words = load_examples(config)
    classifier = train_classifier(examples, words, config)
    if config.save_dtype == "float16":
        classifier = classifier.half().float()  # measured with the rounded weights, which are the ones that are saved
    scores = measure_classifier(classifier, held_out)
    if process_state().is_main_process:
        overall = {attribute: Score.total_of(by_class.values()).share for attribute, by_class in scores.items()}
        classifier.register_to_config(accuracy={attribute: round(share, 4) for attribute, share in overall.items()})
        with atomic_path(Path(config.output_dir) / "classifier") as temporary:
            (classifier.half() if config.save_dtype == "float16" else classifier).save_pretrained(temporary)
    return scores
