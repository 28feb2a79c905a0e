"""Sample sets (latents with their prompts), folders of images, and the batches that training draws from them."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sa_diffusers.atomic_files import atomic_path
from sa_diffusers.families import Family
from sa_diffusers.losses import Batch
from sa_diffusers.seeding import seeded
from sa_diffusers.training import infinite_indices


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass
class SampleSet:
    """Latents [N, C, h, w] and the prompt of each; what the model is shown under which condition."""

    latents: Tensor
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int]) -> "SampleSet":
        return SampleSet(self.latents[list(indices)], [self.prompts[index] for index in indices])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; the prompts stand in its header."""
        with atomic_path(path) as temporary:
            save_file(
                {"latents": self.latents.contiguous()}, temporary, metadata={"prompts": json.dumps(self.prompts)}
            )

    @classmethod
    def load(cls, path: str | Path) -> "SampleSet":
        """Read a file written by `save`; latents are float32, whatever the file keeps."""
        with safe_open(path, "pt") as file:
            return cls(file.get_tensor("latents").float(), json.loads(file.metadata()["prompts"]))

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "SampleSet":
        """Read the samples/ folder of a run, or a sample set on the hub; see `sharing.push_samples`.

        Raises:
            FileNotFoundError: no samples in the folder.
            ModelLoadError: the hub has none of that id, or cannot be reached.
        """
        folder = import_module("sa_diffusers.sharing").fetch_samples(source, revision)  # it knows the hub, and this
        if not (folder / "samples.safetensors").is_file():
            raise FileNotFoundError(f"no samples.safetensors in {folder}; expected the samples/ folder of a run")
        return cls.load(folder / "samples.safetensors")

    def __add__(self, other: "SampleSet") -> "SampleSet":
        return SampleSet(torch.cat([self.latents, other.latents]), self.prompts + other.prompts)

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step` of an endless, reshuffled walk over the whole set."""
        chosen = self.take(infinite_indices(len(self), batch_size, step, seed))
        return family.batch(chosen.latents, chosen.prompts)


def load_image(path: Path, resolution: int) -> Tensor:
    """Read an image as [3, resolution, resolution] in [-1, 1]: short side resized, centre cropped, never stretched.

    Raises:
        ValueError: the file is no readable image, or a grey one.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode in ("1", "L", "LA", "I", "I;16", "F"):
                raise ValueError(f"{path} is a grey image (mode {opened.mode}); convert it to RGB if that is intended")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no readable image ({error}); repair or remove it") from error
    return crop_to_square(image, resolution)


def crop_to_square(image: Image.Image, resolution: int) -> Tensor:
    """An RGB picture as [3, resolution, resolution] in [-1, 1]: short side resized, centre cropped."""
    scale = resolution / min(image.size)
    image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(resolution, resolution, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


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
        data = (
            load_dataset("imagefolder", data_dir=source, split="train")
            if local
            else load_dataset(source, split="train")
        )
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


def surrogate_from_images(family: Family, images: Sequence[Tensor], captions: Sequence[str], seed: int) -> SampleSet:
    """Encode images, each under a caption of the concept."""
    latents = [family.encode(image[None], seeded(seed, "surrogate image", i)) for i, image in enumerate(images)]
    return SampleSet(torch.cat(latents), list(captions))


def uniform_noise(family: Family, count: int, seed: int) -> list[Tensor]:
    """Images of uniform noise in pixel space, [3, H, W] in [-1, 1]; each a function of (seed, index)."""
    size = (family.image_channels, family.resolution, family.resolution)
    noise = (torch.rand(size, generator=seeded(seed, "noise", index)) * 2 - 1 for index in range(count))
    return [image.expand(3, -1, -1) for image in noise]
