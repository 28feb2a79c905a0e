"""A concept to forget, and prompts: whether one names it, and what it says with the surrogate in its place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Concept:
    """A concept to forget, and what takes its place.

    Attributes:
        phrasings: the ways a prompt may name it, such as ("seven", "7").
        surrogate: a prompt, a folder of images, or "noise".
        surrogate_kind: which of these it is.
        siblings: words for what could stand in its place in a prompt, such as the other digits; may be empty. A prompt
            that names neither the concept nor a sibling leaves the choice to the model.
    """

    phrasings: tuple[str, ...]
    surrogate: str
    siblings: tuple[str, ...] = ()
    surrogate_kind: Literal["prompt", "images", "noise"] = "prompt"

    @property
    def name(self) -> str:
        return self.phrasings[0]


def split_phrasings(text: str) -> tuple[str, ...]:
    """ "seven, 7" -> ("seven", "7"). Raises ValueError when nothing is left."""
    phrasings = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not phrasings:
        raise ValueError(
            "expected a concept, got an empty one; pass --concept with one or several phrasings: 'seven, 7'"
        )
    return phrasings


def mentions(prompt: str, words: Sequence[str]) -> bool:
    """Whether a prompt contains one of the words or phrases, as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) for word in words)


def substitute(prompt: str, words: Sequence[str], replacement: str) -> str:
    """Put `replacement` in the place of each of the words or phrases in a prompt."""
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(re.escape(word) for word in longest_first)
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda _: replacement, prompt, flags=re.IGNORECASE)
