"""What forgetting a digit should reach: limits on differences, and by whose reading they are judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from statistics import fmean
from typing import Any

from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from studies.mnist.sections import table
from studies.mnist.spread import Values, mean, short_names
from studies.mnist.study import Study


ASKED = {  # the largest difference that counts as met; {} is the forgotten digit
    "mean entropy, distance from that of flat grey (nats)": 0.1,
    "mean P({}), above that of flat grey": 0.02,
    "mean retained probability, below the original's": 0.01,
    "probability of the worst retained class, below the original's": 0.03,
}
# At least as large as the first of those, in which classifiers that err in opposite directions cancel.
STRICTER = {"mean over the classifiers of the absolute difference in entropy (nats; stricter)": 0.1}
ARCHITECTURE = ("image_size", "kernel_size", "padding", "channels", "num_features")


@dataclass(frozen=True)
class Judges:
    """The classifiers whose readings the bars are for: their short names, and what to call them in a sentence."""

    names: tuple[str, ...]
    words: str

    def of(self, values: Values) -> Values:
        """Their part of what all classifiers read."""
        return {name: values[name] for name in self.names}


def judges(study: Study) -> Judges:
    """The classifiers of the authors' architecture; all classifiers where none is."""
    short = short_names(study.classifiers)
    authors = tuple(short[name] for name, judge in study.classifiers.items() if _is_authors(judge))
    count = len(authors or short)
    of_whom = "the one classifier" if count == 1 else f"the {count} classifiers"
    if not authors:
        return Judges(tuple(short.values()), f"{of_whom} of the study (not of the authors' architecture)")
    left_out = len(short) - count
    return Judges(
        authors, f"{of_whom} of the authors' architecture" + (f" ({left_out} of another left out)" if left_out else "")
    )


def _is_authors(classifier: ImageClassifier) -> bool:
    defaults = signature(DigitClassifier).parameters
    return isinstance(classifier, DigitClassifier) and all(
        _plain(classifier.config[name]) == _plain(defaults[name].default) for name in ARCHITECTURE
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value  # a loaded configuration has lists


def limits(digit: int | str) -> dict[str, float]:
    """The largest difference that counts as met, by the bar's name; those that were asked for, then the stricter."""
    return {name.format(digit): limit for name, limit in (ASKED | STRICTER).items()}


def differences(digit: int | str, before: Values, after: Values) -> dict[str, float]:
    """What `limits` limits, under the same names: of means over the classifiers, except for the stricter one.

    Args:
        before, after: what the judges read in the pictures of the original and of the model that forgot the digit.
    """
    found = (
        abs(mean(after, "concept_entropy") - mean(after, "grey_entropy")),
        mean(after, "concept_probability") - mean(after, "grey_probability"),
        mean(before, "retained_probability") - mean(after, "retained_probability"),
        mean(before, "retained_worst_probability") - mean(after, "retained_worst_probability"),
        fmean(abs(own["concept_entropy"] - own["grey_entropy"]) for own in after.values()),
    )
    return dict(zip(limits(digit), found, strict=True))


def missed(digit: int | str, values: Mapping[str, float], bars: Mapping[str, float] = ASKED) -> list[str]:
    """What is not met, by default of the bars that were asked for, each as "name: value (at most limit)"."""
    names = {name.format(digit): limit for name, limit in bars.items()}
    return [f"{name}: {values[name]:.4f} (at most {limit})" for name, limit in names.items() if values[name] > limit]


def cell(value: float, limit: float) -> str:
    """A difference with its verdict, for a table."""
    return f"{value:.4f} ({'met' if value <= limit else 'missed'})"


def runs_table(digit: int, found: Mapping[str, Mapping[str, float]]) -> dict:
    """A row a bar, a column a run that forgot the digit, from the differences of each run by its title."""
    rows = [
        [name, limit, *(cell(own[name], limit) for own in found.values())] for name, limit in limits(digit).items()
    ]
    return table(f"What forgetting {digit} should reach", ["difference", "at most", *found], rows)


def digits_table(found: Mapping[int, Mapping[str, float]]) -> dict:
    """A row a digit that was forgotten, a column a bar, and last how many digits meet each."""
    bars = (ASKED | STRICTER).values()
    rows = [[digit, *map(cell, own.values(), bars)] for digit, own in found.items()]
    columns = zip(*(own.values() for own in found.values()), strict=True)
    met = [sum(value <= limit for value in column) for column, limit in zip(columns, bars, strict=True)]
    rows.append(["met by", *(f"{count} of {len(found)}" for count in met)])
    names = [f"{name} (at most {limit})" for name, limit in limits("forgotten").items()]
    return table("What forgetting each digit by default should reach", ["forgotten", *names], rows)


def runs_text(digit: int, found: Mapping[str, Mapping[str, float]], judged: Judges) -> list[str]:
    """For each run in a sentence what it reaches and what not."""
    sentences = []
    for title, values in found.items():
        told = missed(digit, values)
        verdict = f"misses {len(told)} of the {len(ASKED)} bars: {'; '.join(told)}" if told else "meets every bar"
        stricter = missed(digit, values, STRICTER)
        also = (
            f"misses the stricter one: {stricter[0]}"
            if stricter
            else f"{'' if told else 'also '}meets the stricter one"
        )
        link = "and" if bool(told) == bool(stricter) else "but"
        sentences.append(f"Judged by {judged.words}, the {title} run {verdict}, {link} {also}.")
    return [
        *sentences,
        "Two bars are on the entropy. The first, which was asked for, takes the difference of the means over the "
        "classifiers, where errors in opposite directions cancel; the stricter takes the mean over the classifiers of "
        "the absolute difference.",
    ]


def digits_text(found: Mapping[int, Mapping[str, float]], judged: Judges) -> str:
    """In how many digits forgetting meets what was asked for, and which miss what."""
    failing = [digit for digit, values in found.items() if missed(digit, values)]
    by_bar = {
        name.format("forgotten"): [str(digit) for digit in failing if found[digit][name.format(digit)] > limit]
        for name, limit in ASKED.items()
    }
    told = "; ".join(f"{name}, missed by {', '.join(digits)}" for name, digits in by_bar.items() if digits)
    strict = sum(not missed(digit, values, STRICTER) for digit, values in found.items())
    return (
        f"Judged by {judged.words}, forgetting by default meets every bar that was asked for in "
        f"{len(found) - len(failing)} of {len(found)} digits"
        + (f" ({told})" if told else "")
        + f". The stricter bar on the entropy is met in {strict} of {len(found)}."
    )
