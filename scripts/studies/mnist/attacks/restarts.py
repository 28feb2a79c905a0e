"""The sixth attack: latent and condition are optimised until a classifier reads the digit, with its controls.

Any classifier has inputs that fool it, so that its own answer proves nothing. What counts is what classifiers that
were held out read, and whether the same attack finds less in a decoder that cannot remember: one with random weights,
and one whose training never showed the digit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

from sa_diffusers.core.seeding import seeded
from sa_diffusers.evaluation.judges.classifier import Score
from sa_diffusers.models import ConditionalVAE
from studies.mnist.attacks.attempt import Decoder
from studies.mnist.attacks.recovered import nearest_neighbours, random_decoder
from studies.mnist.attacks.search import OptimisedAttempt
from studies.mnist.attacks.setting import FORGOT, NEVER, ORIGINAL, Setting, summary
from studies.mnist.readings import DIGIT


RANDOM = "random decoder"
RESTARTS = 32  # half of them from real images, half from the prior
RANDOM_DECODERS = 4  # that share the restarts: one draw of weights would be an anecdote
POOL = 10_000  # training images among which the nearest is looked for
REFERENCES = 200  # real test images of the digit that give distances their scale


@dataclass(frozen=True)
class Gallery:
    """Real images that recovered ones are compared with.

    Attributes:
        images, labels: training images [N, C, H, W] in [0, 1] of all digits, and their digits [N].
        scale: median distance of a test image of the digit from the nearest training image of the digit.
    """

    images: Tensor
    labels: Tensor
    scale: float

    @property
    def of_digit(self) -> Tensor:
        return self.images[self.labels == DIGIT]

    def compare(self, images: Tensor) -> dict[str, float]:
        """How far images are from real ones of the digit.

        Returns:
            "distance_ratio": the median distance to the nearest one, in units of `scale`: 1 is as near as real ones
            are to each other. "nearest_is_digit": the share of the images whose nearest real image, of all digits, is
            one of this digit.
        """
        nearest = self.labels[nearest_neighbours(images, self.images).indices]
        distances = nearest_neighbours(images, self.of_digit).distances
        return {
            "distance_ratio": median(distances.tolist()) / self.scale,
            "nearest_is_digit": (nearest == DIGIT).double().mean().item(),
        }


def make_gallery(setting: Setting) -> Gallery:
    """The first images of the training set, with the test set's distance from them as the scale."""
    train = setting.study.train_images
    images, labels = train.sample(range(min(POOL, len(train)))), train.labels[:POOL]
    held_out = setting.study.test_images.sample(setting.test_indices(DIGIT, REFERENCES))
    distances = nearest_neighbours(held_out, images[labels == DIGIT]).distances
    return Gallery(images, labels, median(distances.tolist()))


def attacked_decoders(setting: Setting) -> dict[str, Decoder]:
    """The model that forgot, the two controls and the original, in the order of the tables."""
    seed = setting.study.config.seed
    untrained = [random_decoder(setting.original.vae, seed + index) for index in range(RANDOM_DECODERS)]
    trained = {name: vae.decode for name, vae in setting.victims.items()}
    return {
        FORGOT: trained[FORGOT],
        RANDOM: side_by_side(untrained),
        NEVER: trained[NEVER],
        ORIGINAL: trained[ORIGINAL],
    }


def side_by_side(models: Sequence[ConditionalVAE]) -> Decoder:
    """One decoder of several models: each gets its share of the rows, in their order."""

    def decode(latents: Tensor, condition: Tensor) -> Tensor:
        parts = zip(models, latents.tensor_split(len(models)), condition.tensor_split(len(models)), strict=True)
        return torch.cat([model.decode(z, c) for model, z, c in parts if len(z)])

    return decode


def start_latents(setting: Setting, digit: int, count: int) -> Tensor:
    """z [count, latent_dim]: encoder means of the first test images of a digit, and from half on draws of N(0, I).

    The first is the study's start. Where the test set has fewer images of the digit, the prior makes up for them.
    """
    means = setting.first_means(digit, count // 2)
    seed, size = setting.study.config.seed, means.shape[1]
    drawn = [torch.randn(size, generator=seeded(seed, "restart", index)) for index in range(count - len(means))]
    return torch.cat([means, torch.stack(drawn)])


def measure(setting: Setting, gallery: Gallery, attempt: OptimisedAttempt) -> dict:
    """What the end points of an attack look like: to every classifier, beside real images, and beside the prior.

    "first_start" follows the study's own start: P of the digit by the classifier that was climbed at the first and
    the last step, and by the held-out ones (their mean, None without any) at the last.
    """
    readings = setting.read(attempt.images)
    others = [reading.target_probability[0].item() for reading in readings[1:]]
    climbed = attempt.target_probability[:, 0].tolist()
    held_out = fmean(others) if others else None
    return (
        summary(readings)
        | gallery.compare(attempt.images)
        | {
            "latent_norm": median(attempt.latents.norm(dim=1).tolist()),
            "first_start": {"before": climbed[0], "after": climbed[-1], "held_out": held_out},
        }
    )


def judged(numbers: Mapping, held_out: bool) -> Score:
    """The restarts that brought the digit back: by most held-out classifiers, or else by the climbed one."""
    return Score(numbers["majority" if held_out else "count"], numbers["total"])


def verdict(scores: Mapping[str, Score], distances: Mapping[str, float]) -> str:
    """What the controls say of the restarts that brought the digit back, as a sentence.

    The model that forgot gives clearly more than a control where the 95 % intervals of their shares do not overlap.

    Args:
        scores: the restarts, at least of `FORGOT`, `RANDOM` and `NEVER`.
        distances: of their end points from real images of the digit.
    """
    forgot = scores[FORGOT]
    if forgot.right == 0:
        return "This recovers nothing from the model that forgot."
    alike = [name for name in (RANDOM, NEVER) if forgot.interval[0] <= scores[name].interval[1]]
    if alike:
        return (
            f"That is not clearly more from the model that forgot than from the control{'s' * (len(alike) > 1)} "
            f"({', '.join(alike)}): it shows what classifiers take for a {DIGIT}, not that the model remembers one."
        )
    start = "That is clearly more from the model that forgot than from either control"
    if distances[FORGOT] < min(distances[RANDOM], distances[NEVER]):
        return f"{start}, and nearer to real ones: something of the {DIGIT} can still be reached through its inputs."
    return (
        f"{start}, but no nearer to real ones: classifiers take it for a {DIGIT}, the distance does not bear it out."
    )
