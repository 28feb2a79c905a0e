"""How projection compares with EWC and with replay alone: every comparison, corrected for how many there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from sa_diffusers.mnist_study.paired import LEVEL, Difference, holm, paired_difference
from sa_diffusers.mnist_study.projection_runs import METHODS, PROJECTIONS, REFERENCE, REPLAY, Method
from sa_diffusers.mnist_study.readings import DIGIT


Numbers = dict[str, list[dict]]  # what is measured of the runs by the method's title, an entry for each seed

# what tells how much was kept: (its name in tables, whether more of it is better)
KEPT: dict[str, tuple[str, bool]] = {
    "retained_probability": ("retained P", True),
    "retained_worst_probability": ("worst retained P", True),
    "retained_negative_elbo": ("test -ELBO, retained (nats)", False),
}
FORGOTTEN = "concept_deviation"
FORGOTTEN_LABEL = f"|pixel - grey| of drawn {DIGIT}s"


@dataclass(frozen=True)
class Comparison:
    """A projecting method beside a reference, by one measure.

    Attributes:
        label: of the measure.
        words: what a negative and a positive difference mean.
        corrected: the p-value after Holm's correction for all comparisons; None where nothing can be tested.
    """

    label: str
    method: str
    reference: str
    words: tuple[str, str]
    difference: Difference
    corrected: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.corrected is not None and self.corrected < LEVEL

    @property
    def direction(self) -> str:
        return self.words[self.difference.mean > 0]

    @property
    def verdict(self) -> str:
        if self.clear:
            return self.direction
        return f"{self.direction} by its own interval only" if self.difference.sign else "no clear difference"

    def numbers(self) -> dict:
        """For study.json."""
        found = self.difference
        return {
            "measure": self.label, "method": self.method, "reference": self.reference, "mean": found.mean,
            "interval": found.interval, "p": found.p_value, "p_holm": self.corrected, "verdict": self.verdict,
        }  # fmt: skip


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
    """Every comparison that the text judges: what is kept beside both references, what is forgotten beside EWC."""
    measures = [
        (reference, key, label, ("worse", "better") if more_is_better else ("better", "worse"))
        for reference in (REFERENCE, REPLAY)
        for key, (label, more_is_better) in KEPT.items()
    ]
    measures.append((REFERENCE, FORGOTTEN, FORGOTTEN_LABEL, ("more forgotten", "less forgotten")))
    found = []
    for reference, key, label, words in measures:
        differences = differences_from(numbers, reference, key)
        found += [(label, method.title, reference.title, words, differences[method.title]) for method in PROJECTIONS]
    p_values = [difference.p_value for *_, difference in found]
    corrected = p_values if None in p_values else holm(p_values)  # of one seed there are none
    return [Comparison(*each, p) for each, p in zip(found, corrected, strict=True)]


def differences_table(numbers: Numbers) -> dict:
    """Every method beside both references, for a look: the verdicts are in the other table."""
    rows = []
    for reference in (REFERENCE, REPLAY):
        by_key = {key: differences_from(numbers, reference, key) for key in KEPT}
        for title in next(iter(by_key.values())):
            rows.append([f"{title} - {reference.title}", *(str(by_key[key][title]) for key in KEPT)])
    columns = ["difference", *(label for label, _ in KEPT.values())]
    return {"title": "Paired differences over the seeds: mean ± standard error", "columns": columns, "rows": rows}


def verdicts_table(comparisons: Sequence[Comparison]) -> dict:
    """Every comparison with its own interval and p-value, and the p-value after the correction."""
    rows = []
    for each in comparisons:
        found = each.difference
        low, high = found.interval or (None, None)
        row = [each.label, each.method, each.reference, found.mean, low, high, found.p_value, each.corrected]
        rows.append([*row, each.verdict])
    return {
        "title": f"The {len(comparisons)} comparisons, with 95 % intervals that are not corrected for their number",
        "columns": [
            "measure", "method", "reference", "difference", "low", "high", "p, uncorrected", "p, Holm", "verdict",
        ],
        "rows": rows,
    }  # fmt: skip


def verdicts_text(numbers: Numbers, comparisons: Sequence[Comparison]) -> list[str]:
    """How many comparisons there are and what chance would give; what is kept by each measure; what is forgotten."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for each in comparisons:
        groups.setdefault((each.label, each.reference), []).append(each)
    *kept, forgotten = groups.values()
    own = fmean(column(numbers[REFERENCE.title], FORGOTTEN))
    return [
        _count_text(comparisons),
        *map(claim, kept),
        f"What is kept has to be read beside what is forgotten: drawn {DIGIT}s are {own:.4f} away from flat grey "
        f"(mean over the pixels) after {REFERENCE.title}, and the difference from that is {_told(forgotten)}.",
    ]


def _count_text(comparisons: Sequence[Comparison]) -> str:
    count = len(comparisons)
    if comparisons[0].corrected is None:
        return f"{count} comparisons are made, of a single seed: none of them can be tested."
    alone, clear = (
        sum(flags) for flags in zip(*((bool(c.difference.sign), c.clear) for c in comparisons), strict=True)
    )
    return (
        f"{count} comparisons are made. At 95 % each, {LEVEL * count:.1f} of them would be expected to be significant "
        f"by chance alone if nothing differed. {alone} are so by their own interval, {clear} after Holm's correction "
        "for all of them. The verdicts in what follows are after the correction; the table has the uncorrected "
        "intervals, too."
    )


def claim(comparisons: Sequence[Comparison]) -> str:
    """Whether projection keeps less than a reference, as sentences, from the comparisons by one measure."""
    label, reference = comparisons[0].label, comparisons[0].reference
    losing = [each.method for each in comparisons if each.clear and each.direction == "worse"]
    return (
        f"{label[0].upper()}{label[1:]}, difference from {reference}, mean ± standard error over the seeds: "
        f"{_told(comparisons)}. By this number less than with {reference} is kept by "
        f"{', '.join(losing) or 'none of them'}."
    )


def _told(comparisons: Sequence[Comparison]) -> str:
    """Differences with their verdicts: "+0.0010 ± 0.0002 in PCGrad, symmetric (better), ..."."""
    return ", ".join(f"{each.difference} in {each.method} ({each.verdict})" for each in comparisons)
