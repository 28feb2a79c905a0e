"""What a picture is asked for by."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """What a picture is asked for by; without text and label it is the empty prompt, or the null class.

    Attributes:
        text: a prompt, or the name of a class.
        label: index of a class, which comes before its name; None: a model of classes goes by the text.
    """

    text: str = ""
    label: int | None = None

    def __str__(self) -> str:
        return repr(self.text) if self.label is None else f"class {self.label}"


def texts(conditions: Sequence[Condition]) -> list[str]:
    """What they say in words. Raises ValueError for a label, which says nothing in words, and for bare strings."""
    for condition in conditions:
        if not isinstance(condition, Condition) or condition.label is not None:
            raise ValueError(f"expected conditions of text alone, got {condition!r}; pass Condition('a red seven')")
    return [condition.text for condition in conditions]


def classes(conditions: Sequence[Condition]) -> list[int | str]:
    """The class of each, by index or by name, "" for the null class. Raises ValueError for bare strings."""
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise ValueError(f"expected conditions, got {condition!r}; pass Condition('seven') or Condition(label=7)")
    return [condition.text if condition.label is None else condition.label for condition in conditions]
