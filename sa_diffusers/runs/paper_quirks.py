"""Three things that the authors' code for class-conditional diffusion does differently from their paper."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.seeding import seeded


QUIRKS = {
    "stretched_samples": "samples for replay and Fisher are stretched to use the whole range of pixels, and 8-bit",
    "fisher_unit_range": "the Fisher is that of images in [0, 1], though the model was trained on [-1, 1]",
    "fisher_label_dropout": "a tenth of the labels are dropped in the Fisher, as they are in training a base model",
}
LABEL_DROPOUT = 0.1  # their cond_drop_prob


def stretch(images: Tensor) -> Tensor:
    """Each image [B, C, H, W] stretched so that its darkest value is -1 and its brightest 1, in 8-bit steps."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    unit = (images - low) / (high - low).clamp_min(1e-5)
    return (unit * 255).round() / 127.5 - 1


class FisherLabelDropout:
    """A diffusion loss that takes the null class at some of a sample's timesteps.

    Which ones stands in the batch, "dropped" [B, T] of booleans, so that the Fisher does not depend on how its
    timesteps are cut into chunks.
    """

    def __init__(self, loss: DiffusionLoss, null_class: int):
        self.loss, self.null_class = loss, null_class
        self.num_terms, self.reduction, self.prediction_type = loss.num_terms, loss.reduction, loss.prediction_type

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        return self.loss.sample_noise(batch, generator)

    def __call__(self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        rest = {key: value for key, value in batch.items() if key != "dropped"}
        dropped = batch["dropped"].gather(1, terms[:, None])[:, 0]
        rest["class_labels"] = rest["class_labels"].masked_fill(dropped, self.null_class)
        return self.loss(model, rest, terms, noise)


def quirky_fisher_batch(batch: Batch, quirks: list[str], num_terms: int, index: int, seed: int) -> Batch:
    """The batch of sample `index` as the authors' Fisher sees it."""
    batch = dict(batch)
    if "fisher_unit_range" in quirks:
        batch["sample"] = (batch["sample"] + 1) / 2
    if "fisher_label_dropout" in quirks:
        drawn = torch.rand(1, num_terms, generator=seeded(seed, "fisher label dropout", index))
        batch["dropped"] = drawn < LABEL_DROPOUT
    return batch
