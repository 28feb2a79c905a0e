"""Train the small classifier that judges generated images. It never takes part in training what generates them.

The bundled classifier (MNIST from the hub, or a local folder in its layout):
    python scripts/train_classifier.py --config configs/digits_classifier.yaml --data_dir ylecun/mnist
Your own images, a folder with metadata.jsonl ({"file_name": ..., "digit": "seven", "ink": "red"} a line):
    python scripts/train_classifier.py --data_dir my_images --attributes digit,ink --output_dir runs/my_classifier
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from sa_diffusers.artifacts import atomic_path
from sa_diffusers.cli import parse_config
from sa_diffusers.digits import WORDS, ColoredDigits, load_strokes
from sa_diffusers.evaluation.classifier import AttributeClassifier, Score, score_images
from sa_diffusers.objectives import Classification
from sa_diffusers.processes import process_state
from sa_diffusers.seeding import derive_seed
from sa_diffusers.training import TrainingConfig, infinite_indices, train


@dataclass
class ClassifierConfig(TrainingConfig):
    data_dir: str = field(default="ylecun/mnist", metadata={"help": "Hub id or local folder of the images."})
    dataset: Literal["imagefolder", "digits"] = field(
        default="imagefolder",
        metadata={"help": "imagefolder (images + metadata.jsonl) or digits (MNIST, coloured)."},
    )
    attributes: str = field(
        default="label", metadata={"help": "Columns with the class names, separated by commas (imagefolder only)."}
    )
    output_dir: str = field(
        default="runs/classifier", metadata={"help": "Run folder; `classifier/` in it is the model."}
    )
    resolution: int = field(
        default=32, metadata={"help": "Height and width in pixels; folder images are fitted to it."}
    )
    num_copies: int = field(default=1, metadata={"help": "Colourings of every digit (dataset digits)."})
    save_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Type of the saved weights, which are the ones that are measured."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every random number."})


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


def load_digits(config: ClassifierConfig) -> tuple[ColoredDigits, ColoredDigits]:
    """Coloured digits of MNIST's training split, and of its test split."""
    strokes = [load_strokes(config.data_dir, split, Path(config.output_dir) / "data") for split in ("train", "test")]
    return ColoredDigits(*strokes[0], config.num_copies, config.seed), ColoredDigits(*strokes[1], seed=config.seed)


def train_classifier(
    data: LabelledFolder | ColoredDigits, words: dict | None, config: ClassifierConfig
) -> AttributeClassifier:
    """Train a classifier of every attribute that the images have; `words` as in AttributeClassifier."""
    labels = [data.attributes(index) for index in range(len(data))]
    classes = {name: sorted({row[name] for row in labels}) for name in labels[0]}
    if words is not None:  # an order that makes sense to people: zero, one, two
        classes = {name: list(words[name]) for name in classes}
    torch.manual_seed(derive_seed(config.seed, "classifier"))
    classifier = AttributeClassifier(classes, words, image_size=config.resolution)
    order_seed = derive_seed(config.seed, "order")

    def batches(step: int) -> dict:
        indices = infinite_indices(len(data), config.train_batch_size, step, order_seed)
        targets = {name: torch.tensor([classes[name].index(labels[i][name]) for i in indices]) for name in classes}
        return {"sample": torch.stack([data.image(index) for index in indices]), "labels": targets}

    train(
        classifier, Classification(), batches, config,
        seed=derive_seed(config.seed, "classifier"), checkpoint_dir=Path(config.output_dir) / "checkpoints",
        description="classifier",
    )  # fmt: skip
    return classifier


def main() -> None:
    config = parse_config(ClassifierConfig, description=__doc__)
    data, held_out = load_digits(config) if config.dataset == "digits" else load_folder(config)
    words = {name: {c: list(w) for c, w in classes.items()} for name, classes in WORDS.items()}
    classifier = train_classifier(data, words if config.dataset == "digits" else None, config)
    if not process_state().is_main_process:
        return
    if config.save_dtype == "float16":
        classifier = classifier.half().float()  # measured with the rounded weights, which are the ones that are saved
    images = torch.stack([held_out.image(index) for index in range(len(held_out))])
    scores = score_images(classifier, images, [held_out.attributes(index) for index in range(len(held_out))])
    accuracy = {}
    for attribute, by_class in scores.items():
        overall, worst = Score.total_of(by_class.values()), min(by_class, key=lambda name: by_class[name].share)
        accuracy[attribute] = round(overall.share, 4)
        print(f"{attribute}: {overall} of the held-out images; the worst class is {worst}: {by_class[worst]}")
    classifier.register_to_config(accuracy=accuracy)
    folder = Path(config.output_dir) / "classifier"
    with atomic_path(folder) as temporary:
        (classifier.half() if config.save_dtype == "float16" else classifier).save_pretrained(temporary)
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
