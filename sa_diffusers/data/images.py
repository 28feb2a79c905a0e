"""Pictures from files: read, cropped to a square, never stretched; folders of them, with or without captions."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def load_image(path: Path, resolution: int) -> Tensor:
    """Read an image as [3, resolution, resolution] in [-1, 1]: short side resized, centre cropped, never stretched.

    Raises:
        ValueError: the file is no readable image, or a grey one.
    """
    with _opened(path) as image:
        if image.mode in ("1", "L", "LA", "I", "I;16", "F"):
            raise ValueError(f"{path} is a grey image (mode {image.mode}); convert it to RGB if that is intended")
    return read_image(path, resolution)


def read_image(path: Path, resolution: int | None = None) -> Tensor:
    """Read an image as [3, H, W] in [-1, 1]; a grey one gets three equal channels.

    Args:
        resolution: scale the short side to this many pixels and crop the centre; None: the image as it is.

    Raises:
        ValueError: the file is no readable image, or one with more than 8 bits a channel.
    """
    with _opened(path) as opened:
        if opened.mode[0] in "IF":  # more than 8 bits of grey, which Pillow would clip and not scale
            raise ValueError(f"expected 8 bits a channel, got the mode {opened.mode} in {path}; convert the image")
        image = ImageOps.exif_transpose(opened).convert("RGB")
    return _pixels(image) if resolution is None else crop_to_square(image, resolution)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as `read_image` gives them, from the header: pixels are not decoded. Raises as it does."""
    with _opened(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations that exchange the sides
        return image.size if turned else image.size[::-1]


def crop_to_square(image: Image.Image, resolution: int) -> Tensor:
    """An RGB picture as [3, resolution, resolution] in [-1, 1]: short side resized, centre cropped."""
    scale = resolution / min(image.size)
    image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return _pixels(image.crop((left, top, left + resolution, top + resolution)))


def _pixels(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Raise ValueError where the file is no image, as it opens or in the block."""
    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no readable image ({error}); repair or remove it") from error


def image_paths(folder: str | Path) -> list[Path]:
    """Image files in a folder, sorted. Raises ValueError when it holds none."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"no image in {folder}; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return paths


class CaptionedImageFolder:
    """A local folder or hub data set of images with a `text` column (the `imagefolder` layout of datasets).

    Raises:
        ValueError: no image or no `text` column.
    """

    def __init__(self, source: str, resolution: int):
        from datasets import load_dataset

        local = Path(source).is_dir()
        data = load_dataset("imagefolder" if local else source, data_dir=source if local else None, split="train")
        missing = {"image", "text"} - set(data.column_names)
        if missing:
            raise ValueError(
                f"{source} lacks the column {' and '.join(sorted(missing))} (it has {data.column_names}); a folder "
                'needs a metadata.jsonl with a line {"file_name": "1.png", "text": "its caption"} for each image'
            )
        self._data, self._resolution = data, resolution
        self._texts = list(data["text"])  # a row of the data set would decode its image too

    def __len__(self) -> int:
        return len(self._data)

    def image(self, index: int) -> Tensor:
        return crop_to_square(self._data[index]["image"].convert("RGB"), self._resolution)

    def caption(self, index: int, rng: random.Random) -> str:
        return self._texts[index]
