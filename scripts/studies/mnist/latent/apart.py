"""Numbers of a latent space: how far one digit's codes stand apart, and the distances between centroids."""

from dataclasses import dataclass

import torch
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from sa_diffusers.core.seeding import seeded


@dataclass(frozen=True)
class Quarantine:
    """How far one digit's points stand apart from the others'.

    Attributes:
        silhouette: mean silhouette coefficient of the digit's points against all others as one cluster, -1 to 1.
        centroid_distance: from the digit's centroid to the mean of the others' centroids, in units of the mean
            distance between two of the others' centroids.
        purity: share of the digit among the k nearest neighbours of its points; by chance its share of all points.
        others_purity: the same of each other digit, averaged over these.
        spread: mean distance of the digit's points to its centroid, in units of the other digits' mean spread.
    """

    silhouette: float
    centroid_distance: float
    purity: float
    others_purity: float
    spread: float


def quarantine(points: Tensor, labels: Tensor, digit: int, k: int = 10) -> Quarantine:
    """Measure how far the points of `digit` stand apart.

    Args:
        points: [N, D].
        labels: [N], every class from 0 to the largest at least once.
        digit: whose points.
        k: neighbours that count for the purity, below N.
    """
    points = points.double()
    means = class_means(points, labels)
    others = torch.arange(len(means)) != digit
    spreads = class_means((points - means[labels]).norm(dim=1), labels)
    purities = neighbour_purity(points, labels, k)
    return Quarantine(
        silhouette=float(silhouette_samples(points, labels == digit)[labels == digit].mean()),
        centroid_distance=float(centroid_ratio(means, digit)),
        purity=float(purities[digit]),
        others_purity=float(purities[others].mean()),
        spread=float(spreads[digit] / spreads[others].mean()),
    )


def neighbour_purity(points: Tensor, labels: Tensor, k: int) -> Tensor:
    """Share of a class's own label among the k nearest neighbours of its points [N, D], by class [classes]."""
    _, neighbours = (
        NearestNeighbors(n_neighbors=k).fit(points.numpy()).kneighbors()
    )  # of itself: a point is not its own
    own = (labels[torch.from_numpy(neighbours)] == labels[:, None]).double().mean(1)
    return class_means(own, labels)


def class_means(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of each class, [classes, ...], of values [N, ...]; labels as for `quarantine`."""
    return torch.stack([values[labels == label].mean(0) for label in range(int(labels.max()) + 1)])


def centroid_distances(points: Tensor, labels: Tensor) -> Tensor:
    """Euclidean distances [classes, classes] between the classes' mean points."""
    return _between(class_means(points.double(), labels))


def centroid_ratio(means: Tensor, digit: int) -> Tensor:
    """From a digit's centroid to the mean of the others', in units of the mean distance between two others, [...].

    Args:
        means: the centroids, [..., classes, D].
    """
    others = means[..., torch.arange(means.shape[-2]) != digit, :]
    return (means[..., digit, :] - others.mean(-2)).norm(dim=-1) / _mean_of_pairs(_between(others))


def distance_ratio(distances: Tensor, digit: int) -> Tensor:
    """Mean distance from a digit to the others, by the mean over all pairs of others, [...]; 1 is no difference.

    Args:
        distances: between the centroids, [..., classes, classes].
    """
    others = torch.arange(distances.shape[-1]) != digit
    return distances[..., digit, others].mean(-1) / _mean_of_pairs(distances[..., others, :][..., others])


@dataclass(frozen=True)
class Null:
    """What a measure is of centroids at random.

    Attributes:
        mean: over the draws.
        low, high: between them lie 95 % of the draws.
    """

    mean: float
    low: float
    high: float

    def place(self, value: float) -> str:
        """Where a value lies: below, within or above the 95 %."""
        return "below" if value < self.low else "above" if value > self.high else "within"

    def __str__(self) -> str:
        return f"{self.mean:.2f} in the mean, 95 % of the draws {self.low:.2f} to {self.high:.2f}"


def null_ratios(num_classes: int, latent_dim: int, seed: int, draws: int = 4000) -> tuple[Null, Null]:
    """`centroid_ratio` and `distance_ratio` where no digit is special: all centroids from one N(0, I).

    The first is about .75 for ten classes in 8 dimensions, not 1: the squared distance of a centroid from the mean of
    n others is 1 + 1/n of a variance on average, that between two centroids 2, and sqrt((1 + 1/9) / 2) = .745.
    """
    generator = seeded(seed, "centroids at random", num_classes, latent_dim)
    means = torch.randn(draws, num_classes, latent_dim, generator=generator, dtype=torch.float64)
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    ratios = centroid_ratio(means, 0), distance_ratio(_between(means), 0)
    first, second = (Null(float(ratio.mean()), *ratio.quantile(tails).tolist()) for ratio in ratios)
    return first, second


def _between(means: Tensor) -> Tensor:
    """Distances [..., n, n] between points [..., n, D]."""
    # not cdist, whose fast path leaves the diagonal above 0
    return (means[..., :, None, :] - means[..., None, :, :]).norm(dim=-1)


def _mean_of_pairs(distances: Tensor) -> Tensor:
    """Mean over the pairs of different points, [...], of symmetric distances [..., n, n]."""
    count = distances.shape[-1]
    return distances.sum((-2, -1)) / (count * (count - 1))
