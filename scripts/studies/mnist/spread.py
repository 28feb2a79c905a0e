"""What all classifiers say of a forgetting run: by classifier, and as mean and spread."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from studies.mnist.study import Study


Values = Mapping[str, Mapping[str, float | None]]  # by classifier, then by metric
CONCEPT = ("concept_probability", "concept_entropy")
RETAINED = ("retained_probability", "retained_worst_probability")
FLOORS = {  # what the same two are for pictures with nothing in them
    "flat grey": ("grey_probability", "grey_entropy"),
    "uniform noise": ("noise_probability", "noise_entropy"),
}


def readings(study: Study, metrics: Mapping, side: str) -> dict[str, dict]:
    """The numbers of every classifier, by its short name, from a run's metrics.json.

    Args:
        side: "before" or "after".

    Raises:
        ValueError: the run was judged by other classifiers than the study's.
    """
    first, *others = study.classifiers
    found = metrics.get("by_classifier", {}).get(side, {})
    if set(found) != set(others):
        raise ValueError(
            f"expected a run that {first} (whose name metrics.json does not hold) and {others} judged; it has numbers "
            f"of {list(found)} beside the first's. Remove the study's runs, or pass the classifiers of these"
        )
    short = short_names(study.classifiers)
    return {short[first]: metrics[side]} | {short[name]: found[name] for name in others}


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What tables call each classifier: the folder of its training, "runs/seed_0/classifier" -> "seed_0".

    Where two would be called the same, all keep their full names.
    """
    paths = {name: Path(name) for name in names}
    short = {name: (path.parent if path.name == "classifier" else path).name for name, path in paths.items()}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def pick(values: Values, key: str) -> list[float]:
    """One metric of every classifier that has it."""
    return [own[key] for own in values.values() if own[key] is not None]


def mean(values: Values, key: str) -> float:
    """One metric's mean over the classifiers."""
    return statistics.fmean(pick(values, key))


def spread(numbers: Sequence[float]) -> str:
    """ "mean ± standard deviation" (that of a sample, n - 1); the number alone where there is one, "–" without any."""
    if not numbers:
        return "–"
    centre = f"{statistics.fmean(numbers):.3f}"
    return centre if len(numbers) == 1 else f"{centre} ± {statistics.stdev(numbers):.3f}"


def cells(values: Values, keys: Iterable[str]) -> list[str]:
    """A table cell for each metric: its mean and spread over the classifiers."""
    return [spread(pick(values, key)) for key in keys]
