"""Small labelled image sets held whole in memory: MNIST, and the 8x8 digits that come with scikit-learn."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor


DatasetName = Literal["mnist", "digits8x8"]
SplitName = Literal["train", "test"]
_SPLIT_SEED = 0  # of digits8x8, which has no split of its own: one for everyone, so that no model sees test images


@dataclass
class LabelledImages:
    """Images with one label each.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: [N] of int64, indices into `names`.
        names: the name of each class.
    """

    images: Tensor
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Chosen images, [B, C, H, W] in [0, 1]."""
        return self.images[torch.as_tensor(indices, dtype=torch.long)].float() / 255


def load_labelled_images(dataset: DatasetName, data_dir: str, split: SplitName) -> LabelledImages:
    """Read one split of a data set.

    Args:
        dataset: mnist ([N, 1, 28, 28], from `data_dir`) or digits8x8 ([N, 1, 8, 8], comes with scikit-learn).
        data_dir: hub id or local folder in the layout of `ylecun/mnist` (columns `image`, `label`); digits8x8 needs
            none.

    Raises:
        ValueError: an unknown data set or split, nothing at `data_dir`, no such column, no images, or images that are
            not 28x28 and grey.
    """
    if split not in get_args(SplitName):
        raise ValueError(f"expected the split train or test, got {split!r}")
    if dataset == "digits8x8":
        return _load_digits8x8(split)
    if dataset == "mnist":
        return _load_mnist(data_dir, split)
    raise ValueError(f"expected one of the data sets {', '.join(get_args(DatasetName))}, got {dataset!r}")


def _load_digits8x8(split: SplitName) -> LabelledImages:
    """1,437 images for training and 360 for testing, each class in equal shares of both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, test = train_test_split(
        np.arange(len(data.target)), test_size=360, stratify=data.target, random_state=_SPLIT_SEED
    )
    chosen = train if split == "train" else test
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)  # counts of dark pixels in blocks of 16
    names = [str(name) for name in data.target_names]
    return LabelledImages(torch.from_numpy(images)[:, None], torch.from_numpy(data.target[chosen]).long(), names)


def _load_mnist(data_dir: str, split: SplitName) -> LabelledImages:
    from datasets import ClassLabel
    from datasets import Image as ImageColumn

    data = _load_split(data_dir, split)
    missing = {"image", "label"} - set(data.column_names)
    if missing:
        raise ValueError(
            f"expected the columns image and label, as in ylecun/mnist, got {data.column_names} from {data_dir}; "
            "rename them or pass another folder"
        )
    if not isinstance(data.features["label"], ClassLabel):
        raise ValueError(
            f"expected the names of the classes with the column label (a ClassLabel), got {data.features['label']} "
            f"from {data_dir}; save it again after `data.class_encode_column('label')`"
        )
    # Decoded here: datasets takes twice as long, row by row.
    files = data.cast_column("image", ImageColumn(decode=False))[:]["image"]
    images = np.stack([_read_digit(file, index, data_dir) for index, file in enumerate(files)])
    labels = torch.tensor(data.select_columns("label")[:]["label"])
    return LabelledImages(torch.from_numpy(images)[:, None], labels, list(data.features["label"].names))


def _load_split(data_dir: str, split: SplitName):
    """One split of a local folder or hub data set; ValueError where there is none."""
    from datasets import load_dataset

    try:
        splits = load_dataset(data_dir)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"expected a local folder or a data set of the hub, got {data_dir!r}, where there is nothing to read "
            f"({error}); check --data_dir, or pass --dataset digits8x8, which needs no download"
        ) from error
    except ValueError as error:  # of datasets, which names no file: 'Instruction "train" corresponds to no data!'
        raise ValueError(f"expected images in {data_dir}, got none ({error}); download the data set again") from error
    if split not in splits:
        raise ValueError(f"expected a {split} split in {data_dir}, got {list(splits)}; add one or pass another folder")
    return splits[split]


def _read_digit(file: dict, index: int, data_dir: str) -> np.ndarray:
    """Decode one image file, {"bytes": its content, or None, "path": where it is then}, as uint8 [28, 28]."""
    with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]) as image:
        if image.mode != "L" or image.size != (28, 28):
            raise ValueError(
                f"expected grey images of 28x28 pixels as in MNIST, got image {index} of {data_dir} with "
                f"{image.width}x{image.height} pixels and mode {image.mode}; convert the images or pass another folder"
            )
        return np.asarray(image)
