"""Numbers of a latent space: how far one digit's codes stand apart, and the distances between centroids."""

from dataclasses import dataclass

import torch
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors
from torch import Tensor


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
    between = torch.cdist(means[others], means[others])
    spreads = class_means((points - means[labels]).norm(dim=1), labels)
    purities = neighbour_purity(points, labels, k)
    return Quarantine(
        silhouette=float(silhouette_samples(points, labels == digit)[labels == digit].mean()),
        centroid_distance=float((means[digit] - means[others].mean(0)).norm() / _mean_of_pairs(between)),
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
    means = class_means(points.double(), labels)
    return (means[:, None] - means[None]).norm(dim=2)  # not cdist, whose fast path leaves the diagonal above 0


def distance_ratio(distances: Tensor, digit: int) -> float:
    """Mean distance from a digit to the others, divided by the mean over all pairs of others; 1 is no difference."""
    others = torch.arange(len(distances)) != digit
    return float(distances[digit, others].mean() / _mean_of_pairs(distances[others][:, others]))


def _mean_of_pairs(distances: Tensor) -> Tensor:
    """Mean over the pairs of different points, of symmetric distances [n, n]."""
    return distances.sum() / (len(distances) * (len(distances) - 1))
