"""The model before and after it forgot one digit, and what all classifiers read in its images."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_diffusers.evaluation.judges.classifier import ImageClassifier, entropies
from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.paper.runs import default_run
from studies.mnist.study import Study, read


DIGIT = 1  # the digit that the study forgets wherever it forgets one only
GREY = 0.5  # what a decoder that was taught uniform noise draws: the mean, which minimises the cross-entropy
NEARLY_GREY = 0.1  # deviation from grey below which an image counts as grey; real digits deviate by more than .3


@dataclass(frozen=True)
class Models:
    """The model before and after forgetting, each in eval mode."""

    before: ConditionalVAEPipeline
    after: ConditionalVAEPipeline

    def items(self) -> list[tuple[str, ConditionalVAEPipeline]]:
        return [("before", self.before), ("after", self.after)]


def forget_one(study: Study) -> Models:
    """The base model and that without `DIGIT`, by default."""
    return Models(study.load(study.base()), study.load(default_run(study, DIGIT)[0]))


def forget_one_by_encoder(study: Study, latent_dim: int | None = None) -> Models:
    """The same with the paper's objective, whose latents come from the encoder and so also move it.

    Takes many times the steps: the KL term alone, one or two hundredths of the loss, spreads the surrogate over the
    prior.
    """
    base = study.base(latent_dim=latent_dim)
    folder, _ = study.forget(
        f"forget_{DIGIT}_by_encoder" + ("" if latent_dim is None else f"_latent_{latent_dim}"),
        DIGIT, model=base, latents="encoder", lr_scheduler="constant", num_train_steps=study.config.encoder_steps,
    )  # fmt: skip
    return Models(study.load(base), study.load(folder))


@dataclass(frozen=True)
class Readings:
    """What classifiers see in N images.

    Attributes:
        probability: P(digit), the mean over the classifiers, [N].
        entropy: of a classifier's distribution in nats, the mean over the classifiers, [N].
        read_as: whether a classifier reads the image as the digit, [classifiers, N] of bool.
        deviation: |pixel - GREY|, the mean over the pixels, [N]: 0 is flat grey, .5 black and white.
    """

    probability: Tensor
    entropy: Tensor
    read_as: Tensor
    deviation: Tensor

    @property
    def shares(self) -> list[float]:
        """The share of the images that each classifier reads as the digit."""
        return self.read_as.double().mean(1).tolist()


def read_digit(classifiers: Iterable[ImageClassifier], images: Tensor, digit: int) -> Readings:
    """Let every classifier read images [N, 1, H, W] in [0, 1] that should show `digit`."""
    distributions = torch.stack([read(classifier, images) for classifier in classifiers])
    return Readings(
        distributions[..., digit].mean(0),
        torch.stack([entropies(distribution) for distribution in distributions]).mean(0),
        distributions.argmax(2) == digit,
        (images - GREY).abs().flatten(1).mean(1),
    )
