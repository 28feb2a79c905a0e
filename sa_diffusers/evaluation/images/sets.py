"""Sets of images that are read only when they are needed: a folder, a labelled data set, samples of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.images import image_paths, image_size, read_image
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.processes import progress_bar
from sa_diffusers.report.pictures import to_pil, to_uint8


class ImageSet:
    """So many images of one size, height and width in pixels, by their index."""

    def __init__(self, name: str, image_size: tuple[int, int], count: int):
        self.name, self.image_size, self._count = name, image_size, count

    def __len__(self) -> int:
        return self._count

    def images(self, indices: Sequence[int]) -> Tensor:
        """Chosen images, float [B, 3, H, W] in [-1, 1]."""
        raise NotImplementedError


class ImageFolder(ImageSet):
    """The images of a folder, in the order of their names; grey ones have three equal channels.

    Args:
        folder: of pictures, see `data.images.IMAGE_SUFFIXES`; folders inside it are not looked into.
        resolution: scale the short side to this many pixels and crop the centre; None: the images as they are.

    Raises:
        ValueError: no such folder, no image in it, a file that is no image, or images of different sizes.
    """

    def __init__(self, folder: str | Path, resolution: int | None = None):
        if not Path(folder).is_dir():
            raise ValueError(f"expected a folder of images, got {folder}, which is none; check the path")
        self._paths, self._resolution = image_paths(folder), resolution
        sizes = [image_size(path) for path in self._paths] if resolution is None else [(resolution, resolution)]
        super().__init__(str(folder), sizes[0], len(self._paths))
        other = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            found = " and ".join(
                f"{sizes[i][0]} x {sizes[i][1]} (height x width) in {self._paths[i]}" for i in (0, other)
            )
            raise ValueError(f"expected images of one size, got {found}; pass --resolution to scale and crop them")

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([read_image(self._paths[index], self._resolution) for index in indices])


class LabelledImageSet(ImageSet):
    """A labelled data set, its labels left aside; grey images get three equal channels."""

    def __init__(self, name: str, data: LabelledImages):
        super().__init__(name, tuple(data.images.shape[2:]), len(data))
        self._data = data

    def images(self, indices: Sequence[int]) -> Tensor:
        return (2 * self._data.sample(indices) - 1).expand(-1, 3, -1, -1)


class DrawnImages(ImageSet):
    """What a model has drawn, latents [N, C, h, w] that are decoded whenever they are read, `decoded_at_once` at a
    time: they take less memory than images."""

    def __init__(self, name: str, family: Family, latents: Tensor, decoded_at_once: int = 8):
        super().__init__(name, (family.resolution, family.resolution), len(latents))
        self._family, self.latents, self._at_once = family, latents, decoded_at_once

    def images(self, indices: Sequence[int]) -> Tensor:
        """Raises FloatingPointError: what is decoded is not finite."""
        images = torch.cat([self._family.decode(part) for part in self.latents[list(indices)].split(self._at_once)])
        if not images.isfinite().all():
            raise FloatingPointError(f"{self.name}: the decoder gave values that are not finite; use float32")
        return images


class RandomSubset(ImageSet):
    """`count` images of another set, chosen at random without replacement; equal arguments choose the same.

    Raises:
        ValueError: `count` is not from 1 to the number of images.
    """

    def __init__(self, image_set: ImageSet, count: int, seed: int):
        if not 1 <= count <= len(image_set):
            raise ValueError(f"expected to choose 1 to {len(image_set)} images of {image_set.name}, got {count}")
        super().__init__(image_set.name, image_set.image_size, count)
        self._image_set = image_set
        order = torch.randperm(len(image_set), generator=seeded(seed, "random subset"))
        self._indices = order[:count].sort().values.tolist()

    def images(self, indices: Sequence[int]) -> Tensor:
        return self._image_set.images([self._indices[index] for index in indices])


def index_batches(image_set: ImageSet, batch_size: int) -> list[range]:
    """The indices of all images, in their order, in batches."""
    return [range(start, min(start + batch_size, len(image_set))) for start in range(0, len(image_set), batch_size)]


def save_images(image_sets: Mapping[str, ImageSet], folder: str | Path, batch_size: int = 64) -> None:
    """Write every set as PNG files to `<folder>/<its key>/`, all or nothing.

    Raises:
        ValueError: the folder holds something already.
    """
    check_empty(folder)
    with atomic_path(folder) as temporary:
        for name, image_set in image_sets.items():
            (temporary / name).mkdir(parents=True)
            for indices in progress_bar(index_batches(image_set, batch_size), f"save {name}", "batches"):
                for index, image in zip(indices, to_uint8(image_set.images(indices)), strict=True):
                    to_pil(image).save(temporary / name / f"{index:06d}.png")


def check_empty(folder: str | Path) -> None:
    """Raise ValueError where a folder to be written holds something already, or is a file."""
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"expected a new or empty folder for images, got {path}, which holds something; pass another")
