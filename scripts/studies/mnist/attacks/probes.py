"""The five attacks without a gradient: what each gives the decoder, and what is seen in the images that come back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.mnist.attacks.attempt import Attempt, Decoder, one_hot
from studies.mnist.attacks.inputs import interpolate, noisy_condition, posterior_sample, random_latents
from studies.mnist.attacks.recovered import Reading
from studies.mnist.attacks.setting import Setting
from studies.mnist.readings import DIGIT


START, END = 7, 4  # where walks come from, and where the triangular one goes
LATENTS, REAL_IMAGES, LEG = 100, 10, 12  # images of the random latents and of the noise, steps of a leg: the study's
SCALES = (0.1, 1.0)  # of the condition of the random latents; the study's notebook has the first

Found = dict[str, tuple[Attempt, list[Reading]]]  # by the model's name


@dataclass(frozen=True)
class Probe:
    """An attack without a gradient, in one of its variants.

    Attributes:
        attempt: runs it against a decoder.
        reported: what the study reports of it, as the end of a sentence; empty for a variant that it does not have.
    """

    name: str
    variant: str
    attempt: Callable[[Decoder], Attempt]
    reported: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.variant}"


def examine(setting: Setting, probe: Probe) -> Found:
    """Run a probe against every model and let every classifier read what comes out."""
    attempts = {name: probe.attempt(vae.decode) for name, vae in setting.victims.items()}
    return {name: (attempt, setting.read(attempt.images)) for name, attempt in attempts.items()}


def random_probes(setting: Setting) -> list[Probe]:
    """Attacks 1 and 2: random latents under weak and full conditions, real latents under noisy conditions."""
    seed, sizes = setting.study.config.seed, setting.sizes
    indices = setting.test_indices(DIGIT, REAL_IMAGES)
    data = setting.study.test_images
    with torch.no_grad():
        mean, log_variance = setting.original.vae.encode(data.sample(indices), data.labels[indices])
    latents, labels = posterior_sample(mean, log_variance, seed), data.labels[indices]

    def random(scale: float) -> Callable[[Decoder], Attempt]:
        return lambda decode: random_latents(decode, DIGIT, LATENTS, scale, seed, **sizes)

    def noisy(softmax: bool) -> Callable[[Decoder], Attempt]:
        classes = sizes["num_classes"]
        return lambda decode: noisy_condition(decode, latents, labels, seed, num_classes=classes, softmax=softmax)

    reported = {0.1: "8 of 100, which it calls close to chance"}
    return [
        *(
            Probe("random latents", f"condition x {scale:g}", random(scale), reported.get(scale, ""))
            for scale in SCALES
        ),
        Probe("noisy conditions", "after a softmax", noisy(True), "0 of 10 (read as 0:1 5:1 8:5 9:3)"),
        Probe("noisy conditions", "as they are", noisy(False)),
    ]


def walks(setting: Setting) -> list[Probe]:
    """Attacks 3 to 5: straight lines between encoder means of the first test image of a digit."""
    means = {digit: setting.first_means(digit, 1)[0] for digit in (START, DIGIT, END)}
    conditions = {digit: one_hot(torch.tensor([digit]), setting.sizes["num_classes"])[0] for digit in means}

    def walk(through: list[int], under: list[int]) -> Callable[[Decoder], Attempt]:
        keys = [means[digit] for digit in through], [conditions[digit] for digit in under]
        return lambda decode: interpolate(decode, *keys, steps_per_leg=LEG)

    return [
        Probe("deceptive walk", f"z {START} to {DIGIT}, c {START}", walk([START, DIGIT], [START] * 2), "7 throughout"),
        Probe("double interpolation", f"z and c {START} to {DIGIT}", walk([START, DIGIT], [START, DIGIT])),
        Probe(
            "triangular walk",
            f"z and c {START} to {DIGIT} to {END}",
            walk([START, DIGIT, END], [START, DIGIT, END]),
            "7, grey in the middle, 4",
        ),
    ]


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the pixels of each image [N, C, H, W], [N]: 0 is flat grey."""
    return images.flatten(1).std(1, correction=0)
