"""What a plane of codes decodes to, as each digit, before and after one was forgotten."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.latent.figures import manifold_pair, plane_maps
from studies.mnist.readings import DIGIT, GREY, NEARLY_GREY, Models, Readings, read_digit
from studies.mnist.sections import figure, section, table
from studies.mnist.study import Study


SIZE = 20  # codes a side
REACH = 3.0
MIDDLE = 2.0  # radius: a standard normal has 86 % of its mass inside in two dimensions


def plane_latents(latent_dim: int) -> Tensor:
    """Codes [SIZE**2, latent_dim] row by row from the top of a plot: dimension 0 grows rightwards, 1 upwards.

    Both run from -REACH to REACH, the other dimensions are 0.
    """
    steps = torch.linspace(-REACH, REACH, SIZE)
    latents = torch.zeros(SIZE**2, latent_dim)
    latents[:, 0] = steps.repeat(SIZE)
    latents[:, 1] = steps.flip(0).repeat_interleave(SIZE)
    return latents


@dataclass(frozen=True)
class Plane:
    """What `plane_latents` decodes to for one class: images [SIZE**2, 1, H, W] in [0, 1], and their readings."""

    images: Tensor
    readings: Readings

    def numbers(self) -> dict[str, float | list[float]]:
        """Means over the pictures, as JSON; `inside` and `outside` are deviations within radius MIDDLE and beyond."""
        deviation = self.readings.deviation
        middle = plane_latents(2).norm(dim=1) <= MIDDLE
        shares = self.readings.shares
        return {
            "read_as": sum(shares) / len(shares),
            "read_as_by_classifier": shares,
            "probability": float(self.readings.probability.mean()),
            "entropy": float(self.readings.entropy.mean()),
            "deviation": float(deviation.mean()),
            "nearly_grey": float((deviation < NEARLY_GREY).double().mean()),
            "inside": float(deviation[middle].mean()),
            "outside": float(deviation[~middle].mean()),
        }


@torch.no_grad()
def decode_plane(pipeline: ConditionalVAEPipeline, digit: int, classifiers: Iterable[ImageClassifier]) -> Plane:
    """Decode the plane with the condition `digit` and let the classifiers read it."""
    latents = plane_latents(pipeline.vae.config.latent_dim)
    images = pipeline.vae.decode(latents, torch.full((len(latents),), digit))
    return Plane(images, read_digit(classifiers, images, digit))


def dead_zone(study: Study, models: Models, folder: Path) -> dict:
    """Text, tables, figures and numbers of the plane decoded as `DIGIT`, and as every other digit for a control."""
    classifiers, names = list(study.classifiers.values()), study.test_images.names
    planes = [[decode_plane(model, label, classifiers) for _, model in models.items()] for label in range(len(names))]
    pair = planes[DIGIT]
    numbers = {
        name: {"before": before.numbers(), "after": after.numbers()}
        for name, (before, after) in zip(names, planes, strict=True)
    }
    grey = read_digit(classifiers, torch.full_like(pair[0].images[:1], GREY), DIGIT)
    measures = {
        "read as its label": "read_as", "entropy": "entropy", "deviation from grey": "deviation",
        "nearly grey": "nearly_grey",
    }  # fmt: skip
    rows = [
        [name, *(each[when][key] for key in measures.values() for when in ("before", "after"))]
        for name, each in numbers.items()
    ]
    where = f"{SIZE} x {SIZE} codes from -{REACH:g} to {REACH:g} in latent dimensions 0 and 1, others 0"
    maps = {
        "mean |pixel - .5|": [plane.readings.deviation.view(SIZE, SIZE) for plane in pair],
        f"P({names[DIGIT]})": [plane.readings.probability.view(SIZE, SIZE) for plane in pair],
    }
    columns = ["label", *(f"{name}, {when}" for name in measures for when in ("before", "after"))]
    manifold, planes_drawn = manifold_pair([p.images for p in pair], names[DIGIT], REACH), plane_maps(maps, REACH)
    caption = (
        "The dead zone in numbers: how far each of these pictures is from grey (0), and the probability of a "
        f"{names[DIGIT]}, the mean over the classifiers."
    )
    figures = [
        figure(manifold, folder / "manifold.png", f"Manifold with the fixed label {names[DIGIT]}: {where}."),
        figure(planes_drawn, folder / "dead_zone.png", caption),
    ]
    text = _text(numbers, names[DIGIT], int(grey.read_as.sum()), len(classifiers))
    tables = [table(f"{where}, decoded as each digit: means over the pictures", columns, rows)]
    return section(text, tables, figures, {"labels": numbers, "grey_read_as": grey.shares})


def _text(numbers: dict[str, dict], name: str, grey_reads: int, num_classifiers: int) -> list[str]:
    before, after = numbers[name]["before"], numbers[name]["after"]
    others = [each for other, each in numbers.items() if other != name]
    kept = {when: sum(each[when]["read_as"] for each in others) / len(others) for when in ("before", "after")}
    least = min(each["after"]["deviation"] for each in others)
    return [
        f"Of the {SIZE**2} codes of a plane decoded as a {name}, {1 - after['read_as']:.1%} are no longer read as a "
        f"{name} after forgetting (before: {1 - before['read_as']:.1%}), and {after['nearly_grey']:.1%} are within "
        f"{NEARLY_GREY:g} of flat grey (before: {before['nearly_grey']:.1%}). The entropy of the readings is "
        f"{before['entropy']:.3f} nats before and {after['entropy']:.3f} after, the mean deviation of a pixel from "
        f"grey {before['deviation']:.3f} and {after['deviation']:.3f}. {grey_reads} of {num_classifiers} classifiers "
        f"read flat grey itself as a {name}.",
        f"Within {MIDDLE:g} of the origin the pictures deviate from grey by {after['inside']:.3f} after forgetting "
        f"(before: {before['inside']:.3f}), farther out by {after['outside']:.3f} (before: {before['outside']:.3f}): "
        f"the middle is {'greyer than' if after['inside'] < after['outside'] else 'no greyer than'} its surroundings. "
        "The study shows a flat grey disc in the middle and strokes outside of it.",
        f"Decoded as the other digits, the same plane is read as what it should be in {kept['before']:.1%} of the "
        f"pictures before and {kept['after']:.1%} after, and none of these digits deviates from grey by less than "
        f"{least:.3f} after.",
    ]
