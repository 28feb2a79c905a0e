"""Sets of images that are read only when they are needed: a folder, a labelled data set, samples of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.images import crop_to_square, image_paths
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.evaluation.before_after import to_pil, to_uint8
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import atomic_path


class ImageSet(Protocol):
    """Images of one size, by their index."""

    name: str
    image_size: tuple[int, int]  # height and width in pixels

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> Tensor:
        """Chosen images, float [B, 3, H, W] in [-1, 1]."""
        ...


class ImageFolder:
    """The images of a folder, in the order of their names; grey ones have three equal channels.

    Args:
        folder: PNG, JPEG, WebP or BMP files; folders inside it are not looked into.
        resolution: scale the short side to this many pixels and crop the centre; None: the images as they are.

    Raises:
        ValueError: no such folder, no image in it, a file that is no image, or images of different sizes.
    """

    def __init__(self, folder: str | Path, resolution: int | None = None):
        if not Path(folder).is_dir():
            raise ValueError(f"expected a folder of images, got {folder}, which is none; check the path")
        self.name, self._paths, self._resolution = str(folder), image_paths(folder), resolution
        if resolution is not None:
            self.image_size = (resolution, resolution)
            return
        sizes = [_stored_size(path) for path in self._paths]
        self.image_size = sizes[0]
        for path, size in zip(self._paths, sizes, strict=True):
            if size != sizes[0]:
                raise ValueError(
                    f"expected images of one size, got {_format(sizes[0])} in {self._paths[0]} and {_format(size)} in "
                    f"{path}; pass --resolution to scale and crop them"
                )

    def __len__(self) -> int:
        return len(self._paths)

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([read_image(self._paths[index], self._resolution) for index in indices])


class LabelledImageSet:
    """A labelled data set, its labels left aside; grey images get three equal channels."""

    def __init__(self, name: str, data: LabelledImages):
        self.name, self._data = name, data
        self.image_size = tuple(data.images.shape[2:])

    def __len__(self) -> int:
        return len(self._data)

    def images(self, indices: Sequence[int]) -> Tensor:
        return (2 * self._data.sample(indices) - 1).expand(-1, 3, -1, -1)


class DrawnImages:
    """Samples that a model has drawn, decoded whenever they are read: latents take less memory than images.

    Attributes:
        prompts: what each was asked for by.
    """

    def __init__(self, name: str, family: Family, samples: SampleSet):
        self.name, self._family, self._latents, self.prompts = name, family, samples.latents, samples.prompts
        self.image_size = (family.resolution, family.resolution)

    def __len__(self) -> int:
        return len(self._latents)

    def images(self, indices: Sequence[int]) -> Tensor:
        # A few at a time: decoding large images takes far more memory than their features.
        return torch.cat([self._family.decode(part) for part in self._latents[list(indices)].split(8)])


class RandomSubset:
    """`count` images of another set, chosen at random without replacement; equal arguments choose the same.

    Raises:
        ValueError: `count` is not from 1 to the number of images.
    """

    def __init__(self, image_set: ImageSet, count: int, seed: int):
        if not 1 <= count <= len(image_set):
            raise ValueError(f"expected to choose 1 to {len(image_set)} images of {image_set.name}, got {count}")
        self.name, self.image_size, self._image_set = image_set.name, image_set.image_size, image_set
        order = torch.randperm(len(image_set), generator=seeded(seed, "random subset"))
        self._indices = order[:count].sort().values.tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def images(self, indices: Sequence[int]) -> Tensor:
        return self._image_set.images([self._indices[index] for index in indices])


def index_batches(image_set: ImageSet, batch_size: int) -> list[range]:
    """The indices of all images, in their order, in batches."""
    return [range(start, min(start + batch_size, len(image_set))) for start in range(0, len(image_set), batch_size)]


def read_image(path: Path, resolution: int | None = None) -> Tensor:
    """Read an image as [3, H, W] in [-1, 1]; a grey one gets three equal channels.

    Args:
        resolution: as for `ImageFolder`.

    Raises:
        ValueError: the file is no readable image, or one with more than 8 bits a channel.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode[0] in "IF":  # more than 8 bits of grey, which Pillow would clip and not scale
                raise ValueError(f"expected 8 bits a channel, got the mode {opened.mode} in {path}; convert the image")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise _unreadable(path, error) from error
    if resolution is not None:
        return crop_to_square(image, resolution)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def save_images(image_sets: Mapping[str, ImageSet], folder: str | Path, batch_size: int = 64) -> None:
    """Write every set as PNG files to `<folder>/<its key>/`, all or nothing.

    Raises:
        ValueError: the folder holds something already.
    """
    check_empty(folder)
    with atomic_path(folder) as temporary:
        for name, image_set in image_sets.items():
            (temporary / name).mkdir(parents=True)
            for indices in tqdm(index_batches(image_set, batch_size), desc=f"save {name}", mininterval=1):
                for index, image in zip(indices, to_uint8(image_set.images(indices)), strict=True):
                    to_pil(image).save(temporary / name / f"{index:06d}.png")


def check_empty(folder: str | Path) -> None:
    """Raise ValueError where a folder to be written holds something already, or is a file."""
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"expected a new or empty folder for images, got {path}, which holds something; pass another")


def _stored_size(path: Path) -> tuple[int, int]:
    """Height and width as `read_image` gives them, from the header: pixels are not decoded."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that exchange the sides
            return image.size if turned else image.size[::-1]
    except (UnidentifiedImageError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is no readable image ({error}); repair or remove it")


def _format(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} (height x width)"
