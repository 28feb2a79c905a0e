"""Methods at equal erasure: of the strengths at which each has forgotten the gentlest, and what that has broken."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.evaluation.intervals import difference_interval, mean_interval, share_interval
from studies.rivals.runs import Point


ERASED = 0.05  # probability of the concept in phrasings that neither training nor forgetting saw
Values = dict[str, Tensor]  # as of `Judge.read`


@dataclass(frozen=True)
class Kept:
    """What one seed's pictures are of.

    Attributes:
        classes: of each retained picture [M]. neighbours: which of them are of a neighbour of the concept.
        groups: by the name of a set, what each of its pictures has in common with others: the seed and the prompt.

    Raises:
        ValueError: unseen or retained pictures of one prompt alone, where some choose and others are reported.
    """

    classes: Tensor
    neighbours: Tensor
    groups: dict[str, list]

    def __post_init__(self) -> None:
        for name, chooses in self.chooses.items():
            if not chooses.any():
                raise ValueError(f"expected two prompts of {name} pictures or more, to choose by one: raise --images")

    @cached_property
    def chooses(self) -> dict[str, Tensor]:
        """Which unseen and retained pictures choose, those of every other prompt of a class; the others judge."""
        classes = {"unseen": [0] * len(self.groups["unseen"]), "retained": self.classes.tolist()}
        found = {}
        for name, of in classes.items():
            numbers: dict[int, dict] = {index: {} for index in of}
            pairs = zip(self.groups[name], of, strict=True)
            found[name] = torch.tensor(
                [numbers[index].setdefault(prompt, len(numbers[index])) % 2 == 1 for prompt, index in pairs]
            )
        return found


@dataclass(frozen=True)
class Measured:
    """A method at one strength, of one seed; `values` are those of `Judge.read`."""

    point: Point
    values: Values
    kept: Kept

    @property
    def erased(self) -> bool:
        """By the unseen phrasings that choose; the others are what is reported of it then."""
        return self.mean_of_choosing("unseen") <= ERASED

    def mean_of_choosing(self, name: str) -> float:
        return self.values[name][self.kept.chooses[SET_OF[name]]].mean().item()


def matched(sweep: Sequence[Measured]) -> Measured:
    """Of the strengths that have forgotten the one that changes kept pictures least; of none, the nearest to it."""
    done = [measured for measured in sweep if measured.erased]
    by = "change" if done else "unseen"
    return min(done or sweep, key=lambda measured: measured.mean_of_choosing(by))


# The set of prompts that each measure is taken on.
SET_OF = {"retained": "retained", "attributes": "retained", "change": "retained", "concept_entropy": "concept"}
NO_SHARES = ("change", "concept_entropy")  # nor probabilities
SET_OF |= {name: name for name in ("concept", "unseen", "unnamed", "long")} | {"concept_attributes": "concept"}


class Pooled:
    """A method's pictures of several seeds together, each at that seed's strength; `parts` are one of each seed.

    Of what has chosen the strength, unseen phrasings and the change of kept pictures, only the prompts are here that
    have not chosen; and the worst class is chosen by those that have.
    """

    def __init__(self, parts: Sequence[Measured]):
        self.parts, kept = parts, [part.kept for part in parts]
        self.values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        self.groups = {name: [g for part in kept for g in part.groups[of]] for name, of in SET_OF.items()}
        self.judges = {name: torch.cat([~part.chooses[name] for part in kept]) for name in ("unseen", "retained")}
        for name in ("unseen", "change"):
            judges = self.judges[SET_OF[name]]
            self.values[name], self.groups[name] = self.values[name][judges], _chosen(self.groups[name], judges)
        self.classes = torch.cat([part.classes for part in kept])
        neighbours = torch.cat([part.neighbours for part in kept])
        if neighbours.any():
            self.values["neighbours"] = self.values["retained"][neighbours]
            self.groups["neighbours"] = _chosen(self.groups["retained"], neighbours)
        self.reached = all(part.erased for part in parts)

    def accuracies(self) -> dict[int, float]:
        """Of each retained class."""
        return {int(c): self.values["retained"][self.classes == c].mean().item() for c in self.classes.unique()}

    @property
    def judges_worst(self) -> Tensor:
        """Which retained pictures judge the class that is the worst by those that choose."""
        chooses, right = ~self.judges["retained"], self.values["retained"]
        classes = self.classes[chooses].unique().tolist()
        worst = min(classes, key=lambda index: right[chooses & (self.classes == index)].mean().item())
        return self.judges["retained"] & (self.classes == worst)

    def _prompts(self, name: str, rows: Tensor) -> list[str] | None:
        """Of the rows: seeds draw theirs from the same ones, so that pictures of a prompt are alike over seeds."""
        return [prompt for _, prompt in _chosen(self.groups[name], rows)] if name in self.groups else None

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals and numbers of pictures, and what it took (seconds: the mean over seeds)."""
        numbers: dict[str, Any] = {}
        for name, values in self.values.items():
            if values.dim() != 1 or not (said := ~values.isnan()).any():
                continue
            interval = partial(mean_interval, least=0.0) if name in NO_SHARES else share_interval
            bounds = interval(values[said], groups=self._prompts(name, said))
            numbers[name] = _number(values[said].mean().item(), bounds, int(said.sum()))
        worst, prompts = self.values["retained"][self.judges_worst], self._prompts("retained", self.judges_worst)
        numbers["worst"] = _number(worst.mean().item(), share_interval(worst, prompts), len(worst))
        points = [part.point for part in self.parts]
        return {
            "strength": [point.strength for point in points],
            "reached": self.reached,
            "seconds": sum(point.seconds for point in points) / len(points),
            "megabytes": max(point.megabytes for point in points),
            "unseen_by_seed": [
                part.values["unseen"][~part.kept.chooses["unseen"]].mean().item() for part in self.parts
            ],
            "retained_by_seed": [part.values["retained"].mean().item() for part in self.parts],
            **numbers,
        }


# What methods may be compared by at equal erasure, and whether more of it is better.
COMPARABLE = {"retained": True, "worst": True, "neighbours": True, "attributes": True, "change": False}


def compare(ours: Pooled, other: Pooled, measures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By how much another method keeps more than ours, with the 95 % interval of the difference, picture by picture.

    Pictures of one prompt count together. "worst" is the class that is ours' worst, by other prompts. Positive is
    better for the other method throughout; `better` says that all of the interval is, and the difference in every
    seed. Runs also differ: the interval is of these weights.
    """
    found = {}
    for name in measures:
        measure = "retained" if name == "worst" else name
        a, b = other.values[measure], ours.values[measure]
        both = ~(a.isnan() | b.isnan())
        if name == "worst":
            both &= ours.judges_worst
        groups = _chosen(ours.groups[measure], both)
        a, b = (a[both], b[both]) if COMPARABLE[name] else (b[both], a[both])
        interval = difference_interval(a, b, groups=[prompt for _, prompt in groups])
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


def _chosen(groups: Sequence, mask: Tensor) -> list:
    return [groups[row] for row in mask.nonzero()[:, 0].tolist()]


def _number(mean: float, interval: tuple[float, float], count: int) -> dict[str, Any]:
    return {"mean": mean, "interval": list(interval), "num_images": count}


def describe(measured: Measured) -> dict[str, Any]:
    """One strength of one seed in plain numbers, for the file of the whole curve."""
    pooled = Pooled([measured])
    values = pooled.values | {name: measured.values[name] for name in ("unseen", "change")}
    means = {name: part[~part.isnan()].mean().item() for name, part in values.items() if part.dim() == 1}
    return asdict(measured.point) | means | {"worst": min(pooled.accuracies().values())}
