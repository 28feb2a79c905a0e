"""Cross-entropy of a classifier with several attributes, on images disturbed as generated ones are."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.objectives.base import Objective


MAX_NOISE = 0.25  # standard deviation of the pixel noise, for images in [-1, 1]
MAX_WARP = 0.1  # change of each of the six entries of the affine map, where a half of the image's width is 1


class Classification(Objective):
    """The sum over attributes of the cross-entropy; a batch is {"sample": images, "labels": {attribute: [B]}}.

    A model's pictures are softer and noisier than real ones, so every other image is blurred and gets noise, each of a
    random strength; a random affine map stands for the variety of handwriting.

    Args:
        disturb: False: the images as they are, without the cost of warping them by nothing.
    """

    def __init__(self, disturb: bool = True):
        self.disturb = disturb

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        if not self.disturb:
            return batch
        images = batch["sample"]
        num = len(images)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        disturbed = (uniform(num) < 0.5).float()
        strength = MAX_NOISE * uniform(num) * disturbed
        return {
            **batch,
            "affine": torch.eye(2, 3) + MAX_WARP * (2 * uniform(num, 2, 3) - 1),
            "blur": uniform(num) * disturbed,
            "noise": strength.view(-1, 1, 1, 1) * torch.randn(images.shape, generator=generator),
        }

    def images(self, batch: Batch) -> Tensor:
        """What the classifier is shown of a drawn batch."""
        parts = (batch[name] for name in ("sample", "affine", "blur", "noise"))
        return disturb(*parts) if self.disturb else batch["sample"]

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(self.images(batch))
        parts = {f"{name}_loss": F.cross_entropy(logits[name], labels) for name, labels in batch["labels"].items()}
        return torch.stack([*parts.values()]).sum(), {name: part.detach() for name, part in parts.items()}


def disturb(images: Tensor, affine: Tensor, blur: Tensor, noise: Tensor) -> Tensor:
    """Warp, then blur, then add noise.

    Args:
        images: [B, C, H, W].
        affine: [B, 2, 3], from output to input coordinates, both in [-1, 1] across the image.
        blur: [B] in [0, 1], the share of the blurred image.
        noise: [B, C, H, W], added as it is.
    """
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    line = images.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line).expand(images.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])
    return images.lerp(blurred, blur.view(-1, 1, 1, 1)) + noise
