"""Pictures from files: read, cropped to a square, never stretched; folders of them, with or without captions."""

import io
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sa_diffusers.data.tables import load_rows
from sa_diffusers.io.hub import explain_load_errors


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
TABLE_SUFFIXES = {
    ".parquet",
    ".arrow",
    ".csv",
    ".json",
    ".jsonl",
    ".tar",
    ".zip",
}  # of data sets in files of their own
UNREAD_SUFFIXES = {".heic", ".heif", ".jxl", ".svg", ".psd"}  # pictures that Pillow does not open


def load_image(path: Path, resolution: int) -> Tensor:
    """Read an image as [3, resolution, resolution] in [-1, 1]: short side resized, centre cropped, never stretched.

    Raises:
        ValueError: the file is no readable image, or a grey one.
    """
    with opened_image(path) as image:
        if image.mode[0] in "1LIF":
            raise ValueError(f"{path} is a grey image (mode {image.mode}); convert it to RGB if that is intended")
    return read_image(path, resolution)


def read_image(path: Path, resolution: int | None = None) -> Tensor:
    """Read an image as [3, H, W] in [-1, 1]; a grey one gets three equal channels.

    Args:
        resolution: scale the short side to this many pixels and crop the centre; None: the image as it is.

    Raises:
        ValueError: the file is no readable image, has several frames, transparent pixels or numbers without range.
    """
    with opened_image(path) as opened:
        image = to_rgb(opened, str(path))
    return _pixels(image) if resolution is None else crop_to_square(image, resolution)


def to_rgb(opened: Image.Image, name: str) -> Image.Image:
    """An image as RGB of 8 bits, upright; 16 bits of grey are scaled, which Pillow would clip.

    Raises:
        ValueError: the file is damaged, has several frames, transparent pixels, or numbers without a range.
    """
    if opened.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got the mode {opened.mode} in {name}; convert the image")
    # A phone's .jpg may hold a second one.
    if opened.format in ("GIF", "TIFF", "AVIF", "WEBP", "PNG") and getattr(opened, "n_frames", 1) > 1:
        raise ValueError(f"expected one picture, got {opened.n_frames} frames in {name}; save the one that is meant")
    try:
        opened.load()
        opened = ImageOps.exif_transpose(opened)
        if opened.mode.startswith("I;16"):
            opened = Image.fromarray((np.asarray(opened, dtype=np.float32) / 257).round().astype(np.uint8))
        image, least = opened.convert("RGB"), 255
        if "A" in opened.getbands() or "transparency" in opened.info:
            least = opened.convert("RGBA").getextrema()[-1][0]
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, EOFError, ... for damaged files
        raise ValueError(f"{name} is no readable image ({error}); repair or remove it") from error
    if least < 255:
        raise ValueError(f"{name} is transparent in part, with nothing behind it; put it on a background")
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as `read_image` gives them, from the header: pixels are not decoded. Raises as it does."""
    with opened_image(path) as image:
        # Orientations that exchange the sides; of a TIFF Pillow has exchanged them.
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
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
def opened_image(file: str | Path | Mapping[str, Any], name: str | None = None) -> Iterator[Image.Image]:
    """A file, or a picture of a data set ("bytes", or where these are None the "path" of a file), opened.

    Raises ValueError where it, in messages by its name, is no image.
    """
    name = name or str(file)
    if isinstance(file, Mapping):
        file = file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"])
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large a picture ({error}); scale it down") from error
    except Exception as error:
        raise ValueError(f"{name} is no readable image ({error}); repair or remove it") from error
    with image:
        yield image


def image_paths(folder: str | Path) -> list[Path]:
    """Image files in a folder, sorted.

    Raises:
        FileNotFoundError: no such folder. ValueError: it holds no image, or one that cannot be read.
    """
    files = [path for path in Path(folder).iterdir() if path.name[0] != "."]  # no previews, ._1.png, ...
    paths = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"no image in {folder}; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    if unread := sorted(path for path in files if path.suffix.lower() in UNREAD_SUFFIXES):
        raise ValueError(f"{unread[0]} cannot be read, and would be left out; convert it to .png, or remove it")
    return paths


def one_split(folder: str) -> dict[str, Any]:
    """What tells `load_dataset("imagefolder", ...)` that all pictures of a folder are one split; {}: they are not.

    By itself it takes a class, or a picture, by a name such as "train" for a split, and leaves out the rest. Folders
    of splits alone, and data sets in files of another kind, are left to it.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    files = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    tables = [path for path in files if path.suffix.lower() in TABLE_SUFFIXES and path.stem != "metadata"]
    splits = {word for words in SPLIT_KEYWORDS.values() for word in words} | {"data"}
    if not pictures or tables or all(len(path.parts) > 1 and path.parts[0].lower() in splits for path in pictures):
        return {}
    return {"data_files": {"train": "**"}}


class CaptionedImageFolder:
    """A local folder or hub data set of images with a `text` column (the `imagefolder` layout of datasets).

    Raises:
        ValueError: no image or no `text` column; a picture without a caption, or whose file is missing or no image.
        ModelLoadError: nothing that can be loaded.
    """

    def __init__(self, source: str, resolution: int):
        from datasets import Image as Encoded

        given = {"path": source}
        if Path(source).is_dir():
            given = {"path": "imagefolder", "data_dir": source, **one_split(source)}
        with explain_load_errors(source, "dataset"):
            data = load_rows(**given)
        missing = {"image", "text"} - set(data.column_names)
        if missing:
            raise ValueError(
                f"{source} lacks the column {' and '.join(sorted(missing))} (it has {data.column_names}); a folder "
                'needs a metadata.jsonl with a line {"file_name": "1.png", "text": "its caption"} for each image'
            )
        self._source, self._resolution = source, resolution
        self._data = data.cast_column("image", Encoded(decode=False))
        self._texts = list(data["text"])  # a row of the data set would decode its image too
        for index, text in enumerate(self._texts):
            if not isinstance(text, str):
                raise ValueError(f"expected a caption in text of {self._name(index)}, got {text!r}; write one")
            if self._data[index]["image"]["bytes"] is None:  # a file that metadata names: is it there?
                with self._opened(index):
                    pass

    def __len__(self) -> int:
        return len(self._data)

    def image(self, index: int) -> Tensor:
        """[3, resolution, resolution] in [-1, 1]. Raises ValueError as `to_rgb` does."""
        with self._opened(index) as image:
            return crop_to_square(to_rgb(image, self._name(index)), self._resolution)

    def caption(self, index: int, rng: random.Random) -> str:
        return self._texts[index]

    def _name(self, index: int) -> str:
        return self._data[index]["image"]["path"] or f"picture {index} of {self._source}"

    def _opened(self, index: int):
        return opened_image(self._data[index]["image"], self._name(index))
