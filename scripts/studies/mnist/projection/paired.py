"""Differences between methods that were run with the same seeds, and the correction for making many of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t


LEVEL = 0.05  # two-sided


@dataclass(frozen=True)
class Difference:
    """A mean difference over paired runs.

    Attributes:
        mean: of the differences.
        standard_error: of the mean, from the spread of the differences (n - 1); None for a single pair.
        count: of the pairs.
    """

    mean: float
    standard_error: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of Student's t, for this difference alone; None for a single pair."""
        if self.standard_error is None:
            return None
        half = float(t.ppf(1 - LEVEL / 2, self.count - 1)) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def p_value(self) -> float | None:
        """Of Student's t test of no difference, two-sided, for this one alone; None for a single pair."""
        if self.standard_error is None:
            return None
        if self.standard_error == 0:
            return float(self.mean == 0)
        return float(2 * t.sf(abs(self.mean) / self.standard_error, self.count - 1))

    @property
    def sign(self) -> int:
        """1 or -1 where the 95 % interval leaves out 0; else 0, as for a single pair."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.mean:+.4f}{error}"


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """values - reference, pair by pair.

    Raises:
        ValueError: no pairs, or another number of values than of references.
    """
    if not values or len(values) != len(reference):
        raise ValueError(f"expected as many values as references, at least one, got {len(values)}, {len(reference)}")
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    count = len(differences)
    error = stdev(differences) / math.sqrt(count) if count > 1 else None
    return Difference(fmean(differences), error, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (1979), in the same order.

    Where nothing differs, the chance that any corrected value is below .05 is at most .05, however the tests depend
    on each other.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
