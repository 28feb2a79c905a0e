"""What is said of the places that one digit's codes have among the others', before and after it was forgotten."""

from collections.abc import Mapping
from dataclasses import asdict

from sa_diffusers.mnist_study.latent_measures import Null, Quarantine
from sa_diffusers.mnist_study.readings import DIGIT


CLUSTER = 0.25  # silhouette up to which there is "no substantial structure", a rule of thumb


def quarantine_section(
    where: str,
    say: str,
    rows: Mapping[str, Quarantine],
    comment: str,
    figure: dict[str, str],
    numbers: dict,
) -> dict:
    """A section of text, one table, one figure and numbers.

    Args:
        where: the images and the model, for the table's title.
        say: the sentences of `quarantine_text`.
        rows: by the name of the codes.
        comment: what there is to say beside it.
    """
    columns = ["codes", "silhouette", "centroid distance", "kNN purity", "kNN purity of the others", "spread"]
    table = {
        "title": f"The {DIGIT} among {where}",
        "columns": columns,
        "rows": [[name, *asdict(each).values()] for name, each in rows.items()],
    }
    return {"text": [say, comment], "tables": [table], "figures": [figure], "numbers": numbers}


def quarantine_text(before: Quarantine, after: Quarantine, where: str, null: Null) -> str:
    """The sentences on a quarantine: its measures, how many of them moved apart, and what they would be by chance.

    Args:
        null: of the centroid's distance.
    """
    apart = sum(getattr(after, name) > getattr(before, name) for name in ("silhouette", "centroid_distance", "purity"))
    cluster = "a cluster" if after.silhouette >= CLUSTER else "no cluster"
    return (
        f"Over {where}, {apart} of 3 measures put the {DIGIT}s farther apart from the other digits after forgetting. "
        f"The silhouette of their codes is {before.silhouette:.3f} before and {after.silhouette:.3f} after: {cluster} "
        f"of their own by a rule of thumb (at least {CLUSTER:g}; Kaufman and Rousseeuw 1990); labels at random give "
        f"about 0. The distance of their centroid from the middle of the others' is {before.centroid_distance:.2f} "
        f"and {after.centroid_distance:.2f} times that between two other digits'. Centroids at random, all from one "
        f"normal distribution, give {null}, less than 1 since the middle of many is nearer than each of them: "
        f"the distance is {null.place(before.centroid_distance)} that range before and "
        f"{null.place(after.centroid_distance)} after. The share of "
        f"{DIGIT}s among their 10 nearest neighbours (purity) is {before.purity:.3f} and {after.purity:.3f} "
        f"({before.others_purity:.3f} and {after.others_purity:.3f} for the other digits), their spread about their "
        f"centroid {before.spread:.2f} and {after.spread:.2f} times the other digits'."
    )
