"""Differences between methods that were run with the same seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t


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
    def sign(self) -> int:
        """1 or -1 where the 95 % interval of Student's t leaves out 0; else 0, as for a single pair."""
        if self.standard_error is None or abs(self.mean) <= t.ppf(0.975, self.count - 1) * self.standard_error:
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
