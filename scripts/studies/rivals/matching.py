"""Methods at equal erasure: of the strengths at which each has forgotten the gentlest, and what that has broken."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.evaluation.intervals import bootstrap_interval, difference_interval
from studies.rivals.runs import Point


ERASED = 0.05  # probability of the concept in phrasings that neither training nor forgetting saw
Values = dict[str, Tensor]  # as of `Judge.read`


@dataclass(frozen=True)
class Measured:
    """A method at one strength, of one seed; `values` are those of `Judge.read`."""

    point: Point
    values: Values

    @property
    def erased(self) -> bool:
        """By every other picture of the unseen phrasings; those between are what is reported of it then."""
        return self.values["unseen"][::2].mean().item() <= ERASED


def matched(sweep: Sequence[Measured]) -> Measured:
    """Of the strengths that have forgotten the one that changes kept pictures least; of none, the nearest to it."""
    done = [measured for measured in sweep if measured.erased]
    by = "change" if done else "unseen"
    return min(done or sweep, key=lambda measured: measured.values[by].mean().item())


@dataclass(frozen=True)
class Kept:
    """What one seed's pictures are of.

    Attributes:
        classes: of each retained picture [M]. neighbours: which of them are of a neighbour of the concept.
        groups: by the name of a set, what each of its pictures has in common with others: the seed and the prompt.
    """

    classes: Tensor
    neighbours: Tensor
    groups: dict[str, list]


# The set of prompts that each measure is taken on.
SET_OF = {"retained": "retained", "attributes": "retained", "change": "retained", "concept_entropy": "concept"}
SET_OF |= {name: name for name in ("concept", "unseen", "unnamed", "long")} | {"concept_attributes": "concept"}


class Pooled:
    """A method's pictures of several seeds together, each at that seed's strength.

    Args:
        parts: one of each seed.
        kept: of the pictures of each seed.
    """

    def __init__(self, parts: Sequence[Measured], kept: Sequence[Kept]):
        self.parts = parts
        self.values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        self.groups = {name: [g for part in kept for g in part.groups[of]] for name, of in SET_OF.items()}
        self.values["unseen"] = torch.cat([part.values["unseen"][1::2] for part in parts])
        self.groups["unseen"] = [g for part in kept for g in part.groups["unseen"][1::2]]
        self.classes = torch.cat([part.classes for part in kept])
        neighbours = torch.cat([part.neighbours for part in kept])
        if neighbours.any():
            self.values["neighbours"] = self.values["retained"][neighbours]
            rows = neighbours.nonzero()[:, 0].tolist()
            self.groups["neighbours"] = [self.groups["retained"][row] for row in rows]
        self.reached = all(part.erased for part in parts)

    def accuracies(self) -> dict[int, float]:
        """Of each retained class."""
        return {int(c): self.values["retained"][self.classes == c].mean().item() for c in self.classes.unique()}

    @property
    def worst_class(self) -> int:
        accuracies = self.accuracies()
        return min(accuracies, key=accuracies.__getitem__)

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals and numbers of pictures, and what it took (seconds: the mean over seeds)."""
        numbers: dict[str, Any] = {}
        for name, values in self.values.items():
            if values.dim() != 1 or not (said := ~values.isnan()).any():
                continue
            groups = self.groups.get(name)
            groups = groups and [group for group, one in zip(groups, said.tolist(), strict=True) if one]
            interval = bootstrap_interval(values[said], groups=groups)
            numbers[name] = _number(values[said].mean().item(), interval, int(said.sum()))
        # The interval of this class alone: that it was chosen for being the worst is not accounted for.
        worst = self.values["retained"][self.classes == self.worst_class]
        numbers["worst"] = _number(worst.mean().item(), bootstrap_interval(worst), len(worst))
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


# What methods may be compared by at equal erasure, and whether more of it is better.
COMPARABLE = {"retained": True, "worst": True, "neighbours": True, "attributes": True, "change": False}


def compare(ours: Pooled, other: Pooled, measures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By how much another method keeps more than ours, with the 95 % interval of the difference, picture by picture.

    Pictures of one prompt are drawn again together. "worst" is the class that is ours' worst, at a level that allows
    for its having been chosen among K (Bonferroni). Positive is better for the other method throughout; `better` says
    that all of the interval is, and the difference in every seed. Runs differ, too: the interval is of these weights.
    """
    found = {}
    for name in measures:
        measure, sign, chosen = name, 1 if COMPARABLE[name] else -1, None
        confidence = 0.95
        if name == "worst":
            measure, chosen = "retained", ours.classes == ours.worst_class
            confidence = 1 - 0.05 / len(ours.classes.unique())
        a, b = sign * other.values[measure], sign * ours.values[measure]
        both = ~(a.isnan() | b.isnan())
        if chosen is not None:
            both &= chosen
        groups = [group for group, one in zip(ours.groups[measure], both.tolist(), strict=True) if one]
        a, b = a[both], b[both]
        interval = difference_interval(a, b, groups=groups, confidence=confidence)
        by_seed = [(a - b)[[group[0] == seed for group in groups]].mean().item() for seed in dict(groups)]
        found[name] = {
            "difference": (a - b).mean().item(),
            "interval": interval,
            "better": interval[0] > 0 and min(by_seed) > 0,
        }
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
    values = pooled.values | {"unseen": measured.values["unseen"]}
    means = {name: part[~part.isnan()].mean().item() for name, part in values.items() if part.dim() == 1}
    return asdict(measured.point) | means | {"worst": min(pooled.accuracies().values())}
