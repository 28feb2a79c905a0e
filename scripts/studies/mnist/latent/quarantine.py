"""What is said of the places that one digit's codes have among the others', before and after it was forgotten."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional as F

from studies.mnist.latent.apart import Null, Quarantine, class_means
from studies.mnist.readings import DIGIT
from studies.mnist.sections import section, table


# Kaufman and Rousseeuw (1990) on the mean silhouette over all points of a clustering: up to the first there is "no
# substantial structure", up to the second one that "is weak and could be artificial".
NO_STRUCTURE, WEAK_STRUCTURE = 0.25, 0.5


def quarantine_section(
    where: str, say: str, rows: Mapping[str, Quarantine], comment: str, figure: dict[str, str], numbers: dict
) -> dict:
    """A section of text, one table, one figure and numbers.

    Args:
        where: the images and the model, for the table's title.
        say: the sentences of `quarantine_text`.
        rows: by the name of the codes.
        comment: what there is to say beside it.
    """
    columns = ["codes", "silhouette", "centroid distance", "kNN purity", "kNN purity of the others", "spread"]
    own = table(f"The {DIGIT} among {where}", columns, [[name, *asdict(each).values()] for name, each in rows.items()])
    return section([say, comment], [own], [figure], numbers)


def quarantine_text(before: Quarantine, after: Quarantine, where: str, null: Null) -> str:
    """The sentences on a quarantine: its measures, how many of them moved apart, and what they would be by chance.

    Args:
        null: of the centroid's distance.
    """
    apart = sum(getattr(after, name) > getattr(before, name) for name in ("silhouette", "centroid_distance", "purity"))
    return (
        f"Over {where}, {apart} of 3 measures put the {DIGIT}s farther apart from the other digits after forgetting. "
        f"The mean silhouette of the {DIGIT}s' codes alone is {before.silhouette:.3f} before and "
        f"{after.silhouette:.3f} after: {structure(after.silhouette)} by the rule of thumb for the mean over a whole "
        f"clustering, which this is not (up to {NO_STRUCTURE:g} none, up to {WEAK_STRUCTURE:g} weak and maybe "
        "artificial; Kaufman and Rousseeuw 1990); labels at random give "
        f"about 0. The distance of their centroid from the middle of the others' is {before.centroid_distance:.2f} "
        f"and {after.centroid_distance:.2f} times that between two other digits'. Centroids at random, all from one "
        f"normal distribution, give {null}, less than 1 since the middle of many is nearer than each of them: "
        f"the distance is {null.place(before.centroid_distance)} that range before and "
        f"{null.place(after.centroid_distance)} after. The share of "
        f"{DIGIT}s among their 10 nearest neighbours (purity) is {before.purity:.3f} and {after.purity:.3f} "
        f"({before.others_purity:.3f} and {after.others_purity:.3f} for the other digits), their spread about their "
        f"centroid {before.spread:.2f} and {after.spread:.2f} times the other digits'."
    )


def structure(silhouette: float) -> str:
    """What Kaufman and Rousseeuw's table would say of a mean silhouette."""
    if silhouette <= NO_STRUCTURE:
        return "no substantial structure"
    return "weak structure at most" if silhouette <= WEAK_STRUCTURE else "more than weak structure"


def digit_silhouettes(points: Tensor, labels: Tensor, chunk_size: int = 500) -> list[float]:
    """The mean silhouette coefficient of each digit's points against all others as one cluster, -1 to 1.

    Of a point it is (b - a) / max(a, b), where a is the mean distance to the other points of its digit and b that to
    the points of all other digits (Rousseeuw 1987): the `silhouette` of a `Quarantine` for every digit at once.

    Args:
        points: [N, D].
        labels: [N], every class from 0 to the largest at least twice, and at least two of them.
        chunk_size: rows of the distance matrix held at once; the result does not depend on it.
    """
    points, members = points.double(), F.one_hot(labels).double()  # [N, classes]
    sums = torch.cat(  # of the distances from a point to all of a class, [N, classes]
        [torch.cdist(rows, points) @ members for rows in points.split(chunk_size)]
    )
    own, counts = sums.gather(1, labels[:, None])[:, 0], members.sum(0)[labels]
    within, outside = own / (counts - 1), (sums.sum(1) - own) / (len(points) - counts)
    return class_means((outside - within) / torch.maximum(outside, within), labels).tolist()


def silhouette_section(where: str, silhouettes: Mapping[str, Sequence[float]]) -> dict:
    """A section on the rank of the digit's silhouette among all digits' own, which needs no bar.

    Args:
        where: the images and the model, for the table's title.
        silhouettes: of every digit as in `digit_silhouettes`, "before" and "after".
    """
    told = []
    for when, values in silhouettes.items():
        others = {digit: value for digit, value in enumerate(values) if digit != DIGIT}
        highest = max(others, key=others.__getitem__)
        rank = 1 + sum(value > values[DIGIT] for value in others.values())
        place = "the highest" if rank == 1 else f"number {rank} from the top"
        told.append(
            f"{when} forgetting it is {place} of {len(values)} (the highest of the others: {others[highest]:.3f}, "
            f"the {highest}s')"
        )
    digits = [str(digit) for digit in range(len(next(iter(silhouettes.values()))))]
    rows = [[when, *values] for when, values in silhouettes.items()]
    ranked = table(f"The silhouette of each digit against all others, {where}", ["codes", *digits], rows)
    text = f"Each digit's codes have a silhouette against all other digits'. That of the {DIGIT}s: {'; '.join(told)}."
    numbers = {"silhouettes": {when: list(values) for when, values in silhouettes.items()}}
    return section([text], [ranked], [], numbers)
