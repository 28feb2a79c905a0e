"""How projection compares with EWC and with replay alone: what is tested, what the tests could show, and the rest."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from scipy.stats import t

from studies.mnist.projection.paired import LEVEL, Difference, holm, paired_difference
from studies.mnist.projection.runs import METHODS, PROJECTIONS, REFERENCE, REPLAY, Method
from studies.mnist.readings import DIGIT
from studies.mnist.sections import table


Numbers = dict[str, list[dict]]  # what is measured of the runs by the method's title, an entry for each seed

# what tells how much was kept: (its name in tables, whether more of it is better)
KEPT: dict[str, tuple[str, bool]] = {
    "retained_probability": ("retained P", True),
    "retained_worst_probability": ("worst retained P", True),
    "retained_negative_elbo": ("test -ELBO, retained (nats)", False),
}
FORGOTTEN = "concept_deviation"
FORGOTTEN_LABEL = f"distance from grey of drawn {DIGIT}s"

# the name of a measure in tables, and what a negative and a positive difference mean
MEASURES = {key: (label, ("worse", "better") if more else ("better", "worse")) for key, (label, more) in KEPT.items()}
MEASURES[FORGOTTEN] = (FORGOTTEN_LABEL, ("more forgotten", "less forgotten"))


@dataclass(frozen=True)
class Comparison:
    """A projecting method beside a reference, by one measure.

    Attributes:
        label: of the measure.
        words: what a negative and a positive difference mean.
        corrected: the p-value after Holm's correction for all tests; None where nothing is tested.
        smallest: the smallest |mean| that would be clear, of `smallest_clear`; None where nothing is tested.
    """

    label: str
    method: str
    reference: str
    words: tuple[str, str]
    difference: Difference
    corrected: float | None = None
    smallest: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.corrected is not None and self.corrected < LEVEL

    @property
    def direction(self) -> str:
        return self.words[self.difference.mean > 0]

    @property
    def verdict(self) -> str | None:
        """None where nothing is tested."""
        if self.corrected is None:
            return None
        if self.clear:
            return self.direction
        return f"{self.direction} by its own interval only" if self.difference.sign else "no clear difference"

    def numbers(self) -> dict:
        """For study.json."""
        found = self.difference
        return {
            "measure": self.label, "method": self.method, "reference": self.reference, "mean": found.mean,
            "interval": found.interval, "p": found.p_value, "p_holm": self.corrected, "smallest": self.smallest,
            "verdict": self.verdict,
        }  # fmt: skip


def smallest_clear(differences: Sequence[Difference]) -> list[float | None]:
    """The smallest |mean| of each difference that Holm's correction for all of them would call clear.

    The standard error s, the number of pairs n and the other differences are taken as they are. Where k of the other
    m - 1 are clear whatever this one is, Holm compares its p-value with LEVEL / (m - k), so that the mean has to
    exceed s t(1 - LEVEL / (2 (m - k)); n - 1). A true difference of this size is often missed. None for differences of
    a single pair.
    """
    p_values = [difference.p_value for difference in differences]
    found: list[float | None] = []
    for index, difference in enumerate(differences):
        if difference.standard_error is None:
            found.append(None)
            continue
        others = holm([*p_values[:index], 1.0, *p_values[index + 1 :]])  # this one is last, so it moves no other
        level = LEVEL / (len(others) - sum(p < LEVEL for p in others))
        found.append(difference.standard_error * _critical(level, difference.count))
    return found


def _critical(level: float, count: int) -> float:
    """The standard errors that a mean of `count` pairs has to be away from 0 to be significant, two-sided."""
    return float(t.ppf(1 - level / 2, count - 1))


def column(runs: Sequence[dict], key: str) -> list[float]:
    """A measure of every run that has it."""
    return [run[key] for run in runs if run[key] is not None]


def differences_from(numbers: Numbers, reference: Method, key: str) -> dict[str, Difference]:
    """Every method's paired difference from a reference, by title."""
    own = column(numbers[reference.title], key)
    return {
        method.title: paired_difference(column(numbers[method.title], key), own)
        for method in METHODS
        if method is not reference
    }


def compare_all(numbers: Numbers) -> list[Comparison]:
    """Every comparison that the text tells: first those with Selective Amnesia, then those with replay alone.

    The study asks how projection compares with Selective Amnesia: these comparisons, of what is kept and of what is
    forgotten, are one family of tests and corrected for each other. The others are told without a test.
    """
    asked = _compare(numbers, REFERENCE, MEASURES)
    differences = [each.difference for each in asked]
    p_values = [difference.p_value for difference in differences]
    corrected = p_values if None in p_values else holm(p_values)  # of one seed there are none
    tested = [
        replace(each, corrected=p, smallest=smallest)
        for each, p, smallest in zip(asked, corrected, smallest_clear(differences), strict=True)
    ]
    return tested + _compare(numbers, REPLAY, KEPT)


def _compare(numbers: Numbers, reference: Method, keys: Iterable[str]) -> list[Comparison]:
    """Every projecting method beside a reference by some measures, not tested."""
    found = []
    for key in keys:
        label, words = MEASURES[key]
        differences = differences_from(numbers, reference, key)
        found += [
            Comparison(label, method.title, reference.title, words, differences[method.title])
            for method in PROJECTIONS
        ]
    return found


def differences_table(numbers: Numbers) -> dict:
    """Every method beside both references, for a look: the verdicts are in the other table."""
    rows = []
    for reference in (REFERENCE, REPLAY):
        by_key = {key: differences_from(numbers, reference, key) for key in KEPT}
        for title in next(iter(by_key.values())):
            rows.append([f"{title} - {reference.title}", *(str(by_key[key][title]) for key in KEPT)])
    columns = ["difference", *(label for label, _ in KEPT.values())]
    return table("Paired differences over the seeds: mean ± standard error", columns, rows)


def verdicts_table(comparisons: Sequence[Comparison]) -> dict:
    """Every comparison with its own interval; of those that are tested the p-values, and what would be clear."""
    rows = []
    for each in comparisons:
        found = each.difference
        low, high = found.interval or (None, None)
        p_value = None if each.corrected is None else found.p_value
        row = [each.label, each.method, each.reference, found.mean, low, high, p_value, each.corrected]
        rows.append([*row, each.smallest, each.verdict])
    title = (
        f"The {len(comparisons)} comparisons, with 95 % intervals that are not corrected for their number; those with "
        f"{REFERENCE.title} are tested"
    )
    columns = [
        "measure", "method", "reference", "difference", "low", "high", "p, uncorrected", "p, Holm",
        "smallest that would be clear", "verdict",
    ]  # fmt: skip
    return table(title, columns, rows)


def verdicts_text(numbers: Numbers, comparisons: Sequence[Comparison]) -> list[str]:
    """How many tests there are and what they can show; what is kept by each measure and forgotten; the rest."""
    asked, others = (
        _by_measure([each for each in comparisons if each.reference == reference.title])
        for reference in (REFERENCE, REPLAY)
    )
    forgotten = asked.pop(FORGOTTEN_LABEL)
    own = fmean(column(numbers[REFERENCE.title], FORGOTTEN))
    return [
        _count_text(comparisons),
        *map(claim, asked.values()),
        f"What is kept has to be read beside what is forgotten: drawn {DIGIT}s are {own:.4f} away from flat grey "
        f"(mean over the pixels) after {REFERENCE.title}, and the difference from that is {_told(forgotten)}.",
        *map(_intervals, others.values()),
    ]


def _by_measure(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    return {label: list(own) for label, own in groupby(comparisons, key=lambda each: each.label)}


def _count_text(comparisons: Sequence[Comparison]) -> str:
    asked = [each for each in comparisons if each.reference == REFERENCE.title]
    count, seeds = len(asked), asked[0].difference.count
    if asked[0].corrected is None:
        return f"{count} comparisons with {REFERENCE.title} are made, of a single seed: none of them can be tested."
    alone = sum(bool(each.difference.sign) for each in asked)
    clear = sum(each.clear for each in asked)
    errors = _critical(LEVEL / count, seeds)
    return (
        f"{count} comparisons with {REFERENCE.title} are tested. At 95 % each, {LEVEL * count:.1f} of them would be "
        f"expected to be significant by chance alone if nothing differed. {alone} are so by their own interval, "
        f"{clear} after Holm's correction for all of them. The verdicts in what follows are after the correction; the "
        f"table also has the uncorrected intervals. The first step of the correction asks {seeds} seeds for a mean "
        f"difference of {errors:.1f} standard errors ({errors / math.sqrt(seeds):.1f} standard deviations), so what "
        "is not shown may well be there. Beside each difference that is not clear stands the smallest one that would "
        "have been, with the spread and the other differences as they are; a true difference of that size is often "
        f"missed. The {len(comparisons) - count} comparisons with {REPLAY.title} are not tested: they are told by "
        "their 95 % intervals, without correction and verdict."
    )


def claim(comparisons: Sequence[Comparison]) -> str:
    """For which methods it is shown that they keep less than a reference, and for which not, by one measure."""
    label, reference = comparisons[0].label, comparisons[0].reference
    beginning = f"{_capitalised(label)}, difference from {reference}, mean ± standard error over the seeds"
    found: dict[str, list[str]] = {"worse": [], "": [], "better": []}
    for each in comparisons:
        found[each.direction if each.clear else ""].append(each.method)
    losing, unknown, gaining = (" and ".join(methods) for methods in found.values())
    shown = ", ".join(
        f"{word} for {methods}" for word, methods in (("shown", losing), ("not shown", unknown)) if methods
    )
    return (
        f"{beginning}: {_told(comparisons)}."
        + (f" By this number, that less is kept than with {reference} is {shown}." if shown else "")
        + (f" That more is kept is shown for {gaining}." if gaining else "")
    )


def _told(comparisons: Sequence[Comparison]) -> str:
    """Differences with their verdicts: "+0.0010 ± 0.0002 in PCGrad, symmetric (better), ..."."""
    told = []
    for each in comparisons:
        could = "" if each.clear or each.smallest is None else f"; clear from {each.smallest:.2g} on"
        verdict = "" if each.verdict is None else f" ({each.verdict}{could})"
        told.append(f"{each.difference} in {each.method}{verdict}")
    return ", ".join(told)


def _intervals(comparisons: Sequence[Comparison]) -> str:
    """Differences with their own intervals, if there are any, by one measure."""
    label, reference = comparisons[0].label, comparisons[0].reference
    known = " (uncorrected 95 % interval)" if comparisons[0].difference.interval else ""
    told = []
    for each in comparisons:
        ends = " to ".join(f"{end:+.4f}" for end in each.difference.interval or ())
        told.append(f"{each.difference.mean:+.4f}" + (f" ({ends})" if ends else "") + f" in {each.method}")
    return f"{_capitalised(label)}, difference from {reference}{known}: {', '.join(told)}."


def _capitalised(label: str) -> str:
    return f"{label[0].upper()}{label[1:]}"
