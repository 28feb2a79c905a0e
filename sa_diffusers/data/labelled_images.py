"""Small labelled image sets held whole in memory: MNIST, CIFAR10, STL10, and the 8x8 digits of scikit-learn."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor


DatasetName = Literal["mnist", "digits8x8", "cifar10", "stl10"]
SplitName = Literal["train", "test", "all"]
# Where `data_dir=None` reads a data set from; digits8x8 comes with scikit-learn.
HUB_IDS = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "stl10": "tanganke/stl10"}
_SPLIT_SEED = 0  # of digits8x8, which has no split of its own: one for everyone, so that no model sees test images


@dataclass(frozen=True)
class _Layout:
    """How the files of a data set hold an image, and the height and width in pixels that it is given here."""

    title: str
    mode: Literal["L", "RGB"]
    stored_size: int
    size: int


_LAYOUTS = {
    "mnist": _Layout("MNIST", "L", 28, 28),
    "cifar10": _Layout("CIFAR10", "RGB", 32, 32),
    "stl10": _Layout("STL10", "RGB", 96, 64),  # the size at which Selective Amnesia models it
}


@dataclass
class LabelledImages:
    """Images with one label each.

    Attributes:
        images: uint8 [N, C, H, W]; C is 1 (grey) or 3 (RGB).
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

    def take(self, rows: Tensor) -> "LabelledImages":
        """Chosen images, by their indices or a mask."""
        return LabelledImages(self.images[rows], self.labels[rows], self.names)

    def __add__(self, other: "LabelledImages") -> "LabelledImages":
        """These and others of the same classes."""
        return LabelledImages(
            torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]), self.names
        )

    def without(self, names: Sequence[str]) -> "LabelledImages":
        """The images of all classes but `names`, in the same order; labels and names stay numbered as they are.

        Raises:
            ValueError: a name that is none of the classes, or no image is left.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"expected names of {', '.join(self.names)}, got {unknown}; check the spelling")
        left_out = torch.tensor([self.names.index(name) for name in names], dtype=torch.long)
        kept = ~torch.isin(self.labels, left_out)
        if not kept.any():
            raise ValueError(f"expected some images to be left, got none without {', '.join(names)}; omit fewer")
        return self.take(kept)


def load_labelled_images(dataset: DatasetName, data_dir: str | None, split: SplitName) -> LabelledImages:
    """Read one split of a data set, or both as one: the images of train, then those of test.

    Args:
        dataset: mnist ([N, 1, 28, 28]), cifar10 ([N, 3, 32, 32]), stl10 ([N, 3, 64, 64], scaled down from 96 pixels
            with antialiasing) or digits8x8 ([N, 1, 8, 8], comes with scikit-learn).
        data_dir: hub id or local folder in the layout of the data set's own hub id (columns `image` or `img`, and
            `label`); None: that hub id, as `HUB_IDS` has it. digits8x8 needs none.

    Raises:
        ValueError: nothing that can be read as such a data set.
    """
    if split not in get_args(SplitName):
        raise ValueError(f"expected the split train, test or all, got {split!r}")
    if dataset == "digits8x8":
        return _load_digits8x8(split)
    if dataset not in _LAYOUTS:
        raise ValueError(f"expected one of the data sets {', '.join(get_args(DatasetName))}, got {dataset!r}")
    source = HUB_IDS[dataset] if data_dir is None else data_dir
    tables, names = _load_tables(source), ("train", "test") if split == "all" else (split,)
    first, *rest = (_read_split(dataset, tables, name, source) for name in names)
    return sum(rest, first)


def _load_digits8x8(split: SplitName) -> LabelledImages:
    """1,437 images for training and 360 for testing, each class in equal shares of both."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, test = train_test_split(
        np.arange(len(data.target)), test_size=360, stratify=data.target, random_state=_SPLIT_SEED
    )
    chosen = {"train": train, "test": test, "all": np.concatenate([train, test])}[split]
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)  # counts of dark pixels in blocks of 16
    names = [str(name) for name in data.target_names]
    return LabelledImages(torch.from_numpy(images)[:, None], torch.from_numpy(data.target[chosen]).long(), names)


def _load_tables(data_dir: str) -> dict:
    """{split: table} of a local folder or hub data set; ValueError where there is none."""
    from datasets import load_dataset

    try:
        return load_dataset(data_dir)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"expected a local folder or a data set of the hub, got {data_dir!r}, where there is nothing to read "
            f"({error}); check --data_dir, or pass --dataset digits8x8, which needs no download"
        ) from error
    except ValueError as error:  # of datasets, which names no file: 'Instruction "train" corresponds to no data!'
        raise ValueError(f"expected images in {data_dir}, got none ({error}); download the data set again") from error


def _read_split(dataset: DatasetName, tables: dict, split: str, data_dir: str) -> LabelledImages:
    """One split; ValueError without it, its images, or labels that have names."""
    from datasets import ClassLabel
    from datasets import Image as ImageColumn

    if split not in tables:
        raise ValueError(f"expected a {split} split in {data_dir}, got {list(tables)}; add one or pass another folder")
    table, layout = tables[split], _LAYOUTS[dataset]
    column = next((name for name in ("image", "img") if name in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise ValueError(
            f"expected the columns image (or img) and label, as in {HUB_IDS[dataset]}, got {table.column_names} from "
            f"{data_dir}; rename them or pass another folder"
        )
    if not isinstance(table.features["label"], ClassLabel):
        raise ValueError(
            f"expected the names of the classes with the column label (a ClassLabel), got {table.features['label']} "
            f"from {data_dir}; save it again after `data.class_encode_column('label')`"
        )
    labels = torch.tensor(table.select_columns("label")[:]["label"])
    if (labels < 0).any():
        count = int((labels < 0).sum())
        raise ValueError(f"expected a class for every image of {data_dir}, got {count} images of no class; omit them")
    # Encoded, and decoded here: datasets takes twice as long, row by row.
    files = table.select_columns(column).cast_column(column, ImageColumn(decode=False))[:][column]
    named = ((file, f"image {index} of {split} of {data_dir}") for index, file in enumerate(files))
    pixels = torch.from_numpy(np.stack([_read_image(file, layout, name) for file, name in named]))
    pixels = pixels[:, None] if layout.mode == "L" else pixels.permute(0, 3, 1, 2).contiguous()
    return LabelledImages(pixels, labels, list(table.features["label"].names))


def _read_image(file: dict, layout: _Layout, which: str) -> np.ndarray:
    """Decode {"bytes": a file's content, or None, "path": where it is then} as uint8 [H, W] or [H, W, 3]."""
    with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]) as image:
        side, kind = layout.stored_size, {"L": "grey", "RGB": "RGB"}[layout.mode]
        if image.mode != layout.mode or image.size != (side, side):
            raise ValueError(
                f"expected {kind} images of {side}x{side} pixels as in {layout.title}, got {which} with "
                f"{image.width}x{image.height} pixels and mode {image.mode}; convert the images or pass another folder"
            )
        if layout.size != side:
            image = image.resize((layout.size, layout.size), Image.Resampling.BILINEAR)  # antialiased, as PIL does
        return np.asarray(image)
