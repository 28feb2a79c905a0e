"""What the study's recovery attacks share: the models under attack, who reads their images, and what is counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

import torch
from torch import Tensor

from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.attacks.attempt import Reader
from studies.mnist.attacks.recovered import Reading, reader, recovered
from studies.mnist.readings import DIGIT, forget_one
from studies.mnist.study import Study, encode_means


ORIGINAL, FORGOT, NEVER = "original", f"forgot {DIGIT}", f"never saw a {DIGIT}"


@dataclass(frozen=True)
class Setting:
    """Who is attacked, with what, and who looks at the result.

    Attributes:
        study: its test images are what the attacks start from.
        original: the pipeline before it forgot. Its encoder supplies latents, whichever decoder is attacked; to
            `NEVER`, trained by itself, they mean something else than to the other two.
        victims: the trained models by name: `FORGOT`, the control `NEVER`, and the upper bound `ORIGINAL`.
        readers: by name. The first is the one that attacks with a gradient climb; the others are held out.
    """

    study: Study
    original: ConditionalVAEPipeline
    victims: dict[str, ConditionalVAE]
    readers: dict[str, Reader]

    @property
    def sizes(self) -> dict[str, int]:
        """The keywords latent_dim and num_classes that attacks ask for."""
        config = self.original.vae.config
        return {"latent_dim": config.latent_dim, "num_classes": config.num_classes}

    def test_indices(self, digit: int, count: int) -> Tensor:
        """Indices of the first `count` test images of a digit, or of all where there are fewer."""
        return (self.study.test_images.labels == digit).nonzero()[:count, 0]

    def first_means(self, digit: int, count: int) -> Tensor:
        """Encoder means [N, latent_dim] of the first test images of a digit, under their own label."""
        return encode_means(self.original, self.study.test_images, self.test_indices(digit, count))

    def read(self, images: Tensor) -> list[Reading]:
        """What each reader sees in images [N, C, H, W] in [0, 1]."""
        return list(recovered(images, self.readers, DIGIT).values())


def set_up(study: Study) -> Setting:
    """Make or load the models and classifiers of the attacks."""
    models = forget_one(study)
    never = study.load(study.base(without=DIGIT))
    return Setting(
        study,
        models.before,
        {FORGOT: models.after.vae, NEVER: never.vae, ORIGINAL: models.before.vae},
        {name: reader(classifier, "digit") for name, classifier in study.classifiers.items()},
    )


def summary(readings: Sequence[Reading]) -> dict:
    """The numbers of one attack on one model, from every reader's view of the same images.

    "count" and "total" are of the images that the first reader takes for the digit, with the 95 % "interval" of their
    share; "held_out" has the share that each further reader takes for it, and "majority" counts the images that more
    than half of these do (0 where there is none).
    """
    first, others = readings[0], readings[1:]
    votes = sum((other.guesses == DIGIT).long() for other in others) if others else torch.zeros(first.guesses.shape)
    return {
        "count": first.recovered.right,
        "total": first.recovered.total,
        "interval": list(first.recovered.interval),
        "probability": first.target_probability.mean().item(),
        "held_out": [other.recovered.share for other in others],
        "held_out_probability": fmean(other.target_probability.mean().item() for other in others) if others else None,
        "majority": int((2 * votes > len(others)).sum()),
        "histogram": first.histogram.tolist(),
    }


def share_cell(shares: Sequence[float]) -> str:
    """Shares of several readers as their mean and range: "0.50 (0.25 to 0.75)"; a dash where there are none."""
    return f"{fmean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})" if shares else "–"


def histogram_cell(histogram: Sequence[int]) -> str:
    """How many images are read as each digit, without those that none is: "0:20 1:8"."""
    return " ".join(f"{digit}:{count}" for digit, count in enumerate(histogram) if count)


def spell(digits: Sequence[int]) -> str:
    """Digits in their order, repetitions counted: "7 x 3, 1 x 2"."""
    return ", ".join(f"{digit} x {len(list(run))}" for digit, run in groupby(digits))


def counts(found: Mapping[str, dict]) -> str:
    """A count of every model, for a sentence: "8 of 100 (forgot 1), 99 of 100 (original)"."""
    return ", ".join(f"{numbers['count']} of {numbers['total']} ({name})" for name, numbers in found.items())
