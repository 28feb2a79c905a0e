"""Methods at equal erasure: of the strengths at which each has forgotten the gentlest, and what that has broken."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.evaluation.intervals import bootstrap_interval, difference_interval, statistic_interval
from sa_diffusers.method_table.runs import Point


ERASED = 0.05  # probability of the concept in phrasings that neither training nor forgetting saw
Values = dict[str, Tensor]  # as of `Judge.read`


@dataclass(frozen=True)
class Measured:
    """A method at one strength, of one seed; `values` are those of `Judge.read`."""

    point: Point
    values: Values

    @property
    def erased(self) -> bool:
        return self.values["unseen"].mean().item() <= ERASED


def matched(sweep: Sequence[Measured]) -> Measured:
    """Of the strengths that have forgotten the one that changes kept pictures least; of none, the nearest to it."""
    done = [measured for measured in sweep if measured.erased]
    by = "change" if done else "unseen"
    return min(done or sweep, key=lambda measured: measured.values[by].mean().item())


@dataclass(frozen=True)
class Kept:
    """What the classes are of the retained pictures [M], and which of them are neighbours of the concept."""

    classes: Tensor
    neighbours: Tensor


class Pooled:
    """A method's pictures of several seeds together, each at that seed's strength.

    Args:
        parts: one of each seed.
        kept: of the retained pictures of each seed.
    """

    def __init__(self, parts: Sequence[Measured], kept: Sequence[Kept]):
        self.parts = parts
        self.values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        self.classes = torch.cat([part.classes for part in kept])
        self.values["neighbours"] = self.values["retained"][torch.cat([part.neighbours for part in kept])]
        self.reached = all(part.erased for part in parts)

    def worst(self, rows: Tensor | None = None) -> float:
        """Accuracy of the worst retained class, among the pictures with these indices."""
        values, classes = self.values["retained"], self.classes
        if rows is not None:
            values, classes = values[rows], classes[rows]
        sums = torch.zeros(int(self.classes.max()) + 1).index_add(0, classes, values)
        return (sums / torch.bincount(classes, minlength=len(sums)))[classes.unique()].min().item()

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals and numbers of pictures, and what it took (the mean over seeds)."""
        numbers: dict[str, Any] = {}
        for name, values in self.values.items():
            if values.dim() == 1 and len(said := values[~values.isnan()]):
                numbers[name] = _number(said.mean().item(), bootstrap_interval(said), len(said))
        count = len(self.classes)
        numbers["worst"] = _number(self.worst(), statistic_interval(self.worst, count, resamples=500), count)
        points = [part.point for part in self.parts]
        return {
            "strength": [point.strength for point in points],
            "reached": self.reached,
            "seconds": sum(point.seconds for point in points) / len(points),
            "megabytes": max(point.megabytes for point in points),
            "unseen_by_seed": [part.values["unseen"].mean().item() for part in self.parts],
            "retained_by_seed": [part.values["retained"].mean().item() for part in self.parts],
            **numbers,
        }


# What a method is to be compared by at equal erasure, and whether more of it is better.
COMPARED = {"retained": True, "worst": True, "neighbours": True, "attributes": True, "change": False}


def compare(ours: Pooled, other: Pooled) -> dict[str, dict[str, Any]]:
    """By how much another method keeps more than ours, with the 95 % interval of the difference, picture by picture.

    Positive is better for the other method throughout; `better` says that all of the interval is.
    """
    found = {}
    for name, more_is_better in COMPARED.items():
        sign = 1 if more_is_better else -1
        if name == "worst":

            def statistic(rows: Tensor) -> float:
                return other.worst(rows) - ours.worst(rows)

            difference = other.worst() - ours.worst()
            interval = statistic_interval(statistic, len(ours.classes), resamples=500)
        else:
            a, b = other.values[name], ours.values[name]
            both = ~(a.isnan() | b.isnan())
            difference = sign * (a[both] - b[both]).mean().item()
            interval = tuple(sorted(sign * end for end in difference_interval(a[both], b[both])))
        found[name] = {"difference": difference, "interval": interval, "better": interval[0] > 0}
    return found


def curve(sweeps: Sequence[Sequence[Measured]], measure: Callable[[Measured], float]) -> list[tuple[float, float]]:
    """(P of the concept in unseen phrasings, a measure) at every strength, each the mean over seeds."""
    points = []
    for level in zip(*sweeps, strict=True):
        erasure = [measured.values["unseen"].mean().item() for measured in level]
        points.append((sum(erasure) / len(level), sum(measure(measured) for measured in level) / len(level)))
    return points


def _number(mean: float, interval: tuple[float, float], count: int) -> dict[str, Any]:
    return {"mean": mean, "interval": list(interval), "num_images": count}


def describe(measured: Measured, kept: Kept) -> dict[str, Any]:
    """One strength of one seed in plain numbers, for the file of the whole curve."""
    pooled = Pooled([measured], [kept])
    means = {name: part[~part.isnan()].mean().item() for name, part in pooled.values.items() if part.dim() == 1}
    return asdict(measured.point) | means | {"worst": pooled.worst()}
