"""MNIST digits redrawn with a chosen stroke width and coloured: [3, 32, 32] images in [-1, 1] with a caption."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from sa_diffusers.data.digits.captions import ATTRIBUTES, caption, random_attributes
from sa_diffusers.data.labelled_images import load_labelled_images
from sa_diffusers.io.atomic_files import load_tensors, save_tensors
from sa_diffusers.io.processes import progress_bar


INK_RGB = {
    "red": (0.90, 0.10, 0.10),
    "yellow": (0.92, 0.78, 0.05),
    "green": (0.10, 0.65, 0.15),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.15, 0.20, 0.95),
    "pink": (0.95, 0.30, 0.75),
}
BACKGROUND_RGB = {"black": (0.04, 0.04, 0.04), "gray": (0.5, 0.5, 0.5), "white": (0.96, 0.96, 0.96)}
HALF_WIDTH = {"thin": (0.6, 0.9), "bold": (1.6, 2.1)}  # of a stroke, in pixels of the original: range of jitter
_SCALE = 4  # strokes are redrawn on a finer grid, then averaged down


def redraw(image: np.ndarray, half_width: float) -> np.ndarray:
    """Redraw a [28, 28] grey digit with a stroke of constant width: the points within `half_width` of its skeleton.

    Returns uint8 [32, 32], the coverage of each pixel by ink (0 to 255).
    """
    from skimage.morphology import skeletonize  # only whoever rebuilds the bundled model needs it (extra: digits)

    fine = ndimage.zoom(image.astype(np.float32), _SCALE, order=1)
    distance = ndimage.distance_transform_edt(~skeletonize(fine > 110)) / _SCALE
    coverage = np.clip((half_width - distance) * _SCALE + 0.5, 0, 1)
    coarse = coverage.reshape(28, _SCALE, 28, _SCALE).mean((1, 3))
    return np.pad(np.rint(coarse * 255).astype(np.uint8), 2)


def load_strokes(data_dir: str, split: str, cache_dir: Path, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Redraw every MNIST digit of a split in each stroke, or load that from `cache_dir`.

    Args:
        data_dir: hub id or local folder in the layout of `ylecun/mnist`.

    Returns:
        Coverage, uint8 [N, 2, 32, 32] in the order of `ATTRIBUTES["stroke"]`, and digit labels [N].

    Raises:
        ValueError: as `load_labelled_images`.
    """
    cache = cache_dir / f"strokes_{split}_{seed}.safetensors"
    if cache.exists():
        stored, _ = load_tensors(cache, "coverage", "label")
        return stored["coverage"], stored["label"]
    data, rng = load_labelled_images("mnist", data_dir, split), np.random.default_rng(seed)
    coverage = torch.empty(len(data), len(HALF_WIDTH), 32, 32, dtype=torch.uint8)
    for index, image in enumerate(progress_bar(data.images[:, 0].numpy(), f"redraw {split} strokes", "images")):
        for position, stroke in enumerate(ATTRIBUTES["stroke"]):
            coverage[index, position] = torch.from_numpy(redraw(image, rng.uniform(*HALF_WIDTH[stroke])))
    save_tensors({"coverage": coverage, "label": data.labels}, cache)
    return coverage, data.labels


def colorize(coverage: Tensor, ink: str, background: str, rng: random.Random) -> Tensor:
    """Ink over background, colours shifted by up to 0.04 a channel: [32, 32] uint8 -> [3, 32, 32] in [-1, 1]."""

    def colour(rgb: tuple[float, float, float]) -> Tensor:
        return torch.tensor([min(1.0, max(0.0, c + rng.uniform(-0.04, 0.04))) for c in rgb]).view(3, 1, 1)

    alpha = coverage.float() / 255
    return (colour(BACKGROUND_RGB[background]) * (1 - alpha) + colour(INK_RGB[ink]) * alpha) * 2 - 1


class ColoredDigits:
    """A captioned image set: `copies` coloured versions of every digit, each a function of (seed, index).

    Args:
        coverage, label: as of `load_strokes`.
        exclude: classes of any attribute; raises ValueError for one that is none, or where an attribute has none left.
    """

    def __init__(self, coverage: Tensor, label: Tensor, copies: int = 1, seed: int = 0, exclude: Sequence[str] = ()):
        digits, known = ATTRIBUTES["digit"], [name for names in ATTRIBUTES.values() for name in names]
        if unknown := sorted(set(exclude) - set(known)):
            raise ValueError(f"expected classes to exclude of {', '.join(known)}, got {', '.join(unknown)}")
        left_out = [digits.index(name) for name in digits if name in exclude]
        if left_out:
            kept = ~torch.isin(label, torch.tensor(left_out))
            coverage, label = coverage[kept], label[kept]
        if not len(label) or any(set(names) <= set(exclude) for names in ATTRIBUTES.values()):
            raise ValueError("expected at least one class of each attribute that is not excluded, got none")
        self.others_excluded = [name for name in exclude if name not in digits]
        self.coverage, self.label, self.copies, self.seed = coverage, label, copies, seed

    def __len__(self) -> int:
        return len(self.label) * self.copies

    def attributes(self, index: int) -> dict[str, str]:
        """The class of every attribute of image `index`."""
        drawn = random_attributes(random.Random(f"attributes {self.seed} {index}"), self.others_excluded)
        return drawn | {"digit": ATTRIBUTES["digit"][int(self.label[index % len(self.label)])]}

    def image(self, index: int) -> Tensor:
        """[3, 32, 32] in [-1, 1]."""
        attributes = self.attributes(index)
        coverage = self.coverage[index % len(self.label), ATTRIBUTES["stroke"].index(attributes["stroke"])]
        rng = random.Random(f"colours {self.seed} {index}")
        return colorize(coverage, attributes["ink"], attributes["background"], rng)

    def caption(self, index: int, rng: random.Random) -> str:
        """A new caption at each call with a new state of `rng`."""
        return caption(self.attributes(index), rng)
