"""Sample sets, latents with their conditions, and the batches that training draws from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import explain_read_errors, load_tensors, save_tensors
from sa_diffusers.training.loop import infinite_indices


@dataclass
class SampleSet:
    """Latents [N, C, h, w] and the condition of each; what the model is shown under what.

    Sample i is of concept i % `shares`, where they are of several.
    """

    latents: Tensor
    conditions: list[Condition]
    shares: int = 1

    def __len__(self) -> int:
        return len(self.conditions)

    def take(self, indices: Sequence[int]) -> "SampleSet":
        return SampleSet(self.latents[list(indices)], [self.conditions[index] for index in indices])

    def of_shares(self, kept: Sequence[int]) -> "SampleSet":
        """Those of some of the concepts."""
        rows = [row for row in range(len(self)) if row % self.shares in kept]
        return replace(self.take(rows), shares=len(kept))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; its header holds the texts, labels and masks."""
        said = {name: [getattr(c, name[:-1]) for c in self.conditions] for name in ("labels", "masks")}
        notes = {name: values for name, values in said.items() if any(value is not None for value in values)}
        save_tensors({"latents": self.latents}, path, prompts=[c.text for c in self.conditions], **notes)

    @classmethod
    def load(cls, path: str | Path) -> "SampleSet":
        """Read a file written by `save`; latents are float32, whatever the file keeps. Raises DamagedFile."""
        tensors, notes = load_tensors(path)
        with explain_read_errors(path):
            latents, texts = tensors["latents"].float(), notes["prompts"]
            labels, masks = (notes.get(name) or [None] * len(texts) for name in ("labels", "masks"))
            if not len(latents) == len(texts) == len(labels) == len(masks):
                raise ValueError(f"expected a prompt for each of {len(latents)} latents, got {len(texts)}")
            return cls(latents, list(map(Condition, texts, labels, masks)))

    def __add__(self, other: "SampleSet") -> "SampleSet":
        return SampleSet(torch.cat([self.latents, other.latents]), self.conditions + other.conditions)

    def batch(self, family: Family, batch_size: int, step: int, seed: int) -> Batch:
        """Batch `step` of an endless, reshuffled walk over the whole set, through its shares in turn."""
        chosen = self.take(infinite_indices(len(self), batch_size, step, seed, self.shares))
        return family.batch(chosen.latents, chosen.conditions)


def surrogate_from_images(family: Family, images: Sequence[Tensor], captions: Sequence[str], seed: int) -> SampleSet:
    """Encode images, [3, H, W] in [-1, 1], each under a caption of the concept."""
    latents = [family.encode(image[None], seeded(seed, "surrogate image", i)) for i, image in enumerate(images)]
    return SampleSet(torch.cat(latents), list(map(Condition, captions)))


def uniform_noise(family: Family, count: int, seed: int) -> list[Tensor]:
    """Images of uniform noise in pixel space, [3, H, W] in [-1, 1]; each a function of (seed, index)."""
    size = (family.image_channels, family.resolution, family.resolution)
    noise = (torch.rand(size, generator=seeded(seed, "noise", index)) * 2 - 1 for index in range(count))
    return [image.expand(3, -1, -1) for image in noise]
