"""Whether an attack brought the class back: what readers see, how near the real images are, and a control."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.evaluation.judges.classifier import ImageClassifier, Score
from sa_diffusers.models import ConditionalVAE
from studies.mnist.attacks.attempt import Reader


@dataclass(frozen=True)
class Reading:
    """What one reader sees in the images of an attack.

    Attributes:
        target_probability: P(target) of each image [B].
        guesses: the class that it reads in each image [B].
        histogram: how many images it reads as each class, [classes].
        recovered: the images read as the target, with the interval of their share.
    """

    target_probability: Tensor
    guesses: Tensor
    histogram: Tensor
    recovered: Score


@dataclass(frozen=True)
class Neighbours:
    """The nearest real image of each image: its L2 distance over all pixels [B], and its index [B]."""

    distances: Tensor
    indices: Tensor


def reader(classifier: ImageClassifier, attribute: str) -> Reader:
    """One head of a classifier as a reader: images [B, 1 or 3, H, W] in [0, 1] to logits [B, classes].

    It reads in eval mode whatever mode the classifier is in: batch norm in training mode would mix the images of a
    batch, and change with every look.
    """

    def read(images: Tensor) -> Tensor:
        training = classifier.training
        classifier.eval()
        try:
            return classifier((2 * images - 1).expand(-1, 3, -1, -1))[attribute]
        finally:
            classifier.train(training)

    return read


@torch.no_grad()
def recovered(images: Tensor, readers: Mapping[str, Reader], target: int, batch_size: int = 256) -> dict[str, Reading]:
    """Let every reader look at the images of an attack.

    An attack that climbed a reader has fooled it at least; only readers that were held out can say that the class is
    back, and only next to the same attack on a decoder that never knew it.

    Args:
        images: [B, C, H, W] in [0, 1].
        readers: by name, those that were attacked and those that were held out.
        target: index of the class, the same for every reader.
    """
    readings = {}
    for name, read in readers.items():
        logits = torch.cat([read(part).float() for part in images.split(batch_size)])
        guesses = logits.argmax(1)
        histogram = guesses.bincount(minlength=logits.shape[1])
        score = Score(int(histogram[target]), len(images))
        readings[name] = Reading(logits.softmax(1)[:, target], guesses, histogram, score)
    return readings


def nearest_neighbours(images: Tensor, real_images: Tensor, chunk_size: int = 64) -> Neighbours:
    """Find for each image [B, C, H, W] in [0, 1] the nearest of real ones [N, C, H, W], also in [0, 1].

    A distance needs a scale: compare with that of other real images of the class to these.

    Args:
        chunk_size: images compared at once; the result does not depend on it.
    """
    real = real_images.flatten(1)
    # By subtraction: the shortcut through a matrix product gives a copy of a real image a distance above 0.
    parts = [
        torch.cdist(part, real, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        for part in images.flatten(1).split(chunk_size)
    ]
    return Neighbours(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]))


def random_decoder(model: ConditionalVAE, seed: int) -> ConditionalVAE:
    """A control: a model of the same architecture, weights freshly initialised, in eval mode.

    What an attack draws from it owes nothing to training. The model and the global random state stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well; weights are initialised on the CPU.
        torch.default_generator.manual_seed(derive_seed(seed, "random decoder"))
        fresh = type(model).from_config(model.config)
    return fresh.to(model.device).type(model.dtype).eval()
