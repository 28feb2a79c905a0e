"""A concept to forget, and prompts: whether one names it, and what it says with the surrogate in its place."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal


@dataclass(frozen=True)
class Concept:
    """A concept to forget, and what takes its place.

    Attributes:
        phrasings: the ways a prompt may name it, such as ("seven", "7").
        surrogate: a prompt ("": nothing in particular), a folder of images, or "noise"; None: none is known.
        surrogate_kind: which of these it is.
        siblings: words for what could stand in its place in a prompt, such as the other digits; may be empty. A prompt
            that names neither the concept nor a sibling leaves the choice to the model.
        plurals: whether a plural, or a possessive without its apostrophe, also names it.
    """

    phrasings: tuple[str, ...]
    surrogate: str | None
    siblings: tuple[str, ...] = ()
    surrogate_kind: Literal["prompt", "images", "noise"] = "prompt"
    plurals: bool = False

    @property
    def name(self) -> str:
        return self.phrasings[0]

    @property
    def key(self) -> dict[str, object]:
        """What decides which prompts name it."""
        return {"phrasings": list(self.phrasings)} | ({"plurals": True} if self.plurals else {})

    def named_in(self, prompt: str) -> bool:
        """Whether a prompt asks for it; see `mentions`."""
        return mentions(prompt, self.phrasings, self.plurals)

    def replaced_in(self, prompt: str, replacement: str) -> str:
        """What a prompt says with something else in its place; see `substitute`."""
        return substitute(prompt, self.phrasings, replacement, self.plurals)


def split_phrasings(text: str, flag: str = "--concept") -> tuple[str, ...]:
    """ "seven, 7" -> ("seven", "7"). Raises ValueError when nothing is left, or for the {} of a template."""
    parts = (part.strip() for part in re.split("[,，、،]", text))
    phrasings = tuple(dict.fromkeys(part for part in parts if fold(part)))
    if not phrasings or "{}" in text:
        raise ValueError(
            f"expected {flag} with one or several phrasings in words, separated by commas, got {text!r}; pass such "
            "as 'seven, 7'"
        )
    return phrasings


def fold(text: str) -> str:
    """A text as it is compared: NFKC and case folding, without marks that nobody sees, white space, hyphens and
    underscores as one space, typographic apostrophes as plain ones."""
    return _folded(text)[0].strip()


def mentions(prompt: str, words: Sequence[str], plurals: bool = False) -> bool:
    """Whether a prompt contains one of the words or phrases, as whole words, however it is written; see `fold`.

    Scripts that put no spaces between words (Chinese, Japanese, Korean, Thai, ...) have no whole words: there, a
    phrase within any text counts.
    """
    return bool(_places(prompt, words, plurals))


def substitute(prompt: str, words: Sequence[str], replacement: str, plurals: bool = False) -> str:
    """Put `replacement` in the place of each of the words or phrases in a prompt; an ending of a plural stays."""
    offsets = _folded(prompt)[1]
    for start, end in reversed(_places(prompt, words, plurals)):
        prompt = prompt[: offsets[start]] + replacement + prompt[offsets[end] :]
    return prompt


_APOSTROPHES = dict.fromkeys("‘’ʼ′´`", "'")
_UNSPACED = (  # first and last letter of the scripts without spaces, and of Korean, whose particles join the word
    ("\u0e00", "\u0eff"), ("\u1000", "\u109f"), ("\u1100", "\u11ff"), ("\u1780", "\u17ff"), ("\u3040", "\u318f"),
    ("\u31a0", "\u31ff"), ("\u3400", "\u9fff"), ("\uac00", "\ud7ff"), ("\uf900", "\ufaff"),
    ("\U0001b000", "\U0001b16f"), ("\U00020000", "\U000323af"),
)  # fmt: skip


@lru_cache(2**14)
def _folded(text: str) -> tuple[str, Sequence[int]]:
    """A text as it is compared, and for each of its characters, and its end, where that begins in the text."""
    if text.isascii() and not re.search(r"[\s_-]{2}", text):  # most prompts, fast
        return re.sub(r"[\s_-]", " ", text.replace("`", "'").lower()), range(len(text) + 1)
    folded, offsets, at = [], [], 0
    while at < len(text):
        end = at + 1
        while end < len(text) and _continues(text[end]):
            end += 1
        for letter in _folded_letter(text[at:end]):
            if letter != " " or folded[-1:] != [" "]:
                folded.append(letter)
                offsets.append(at)
        at = end
    return "".join(folded), [*offsets, len(text)]


def _continues(letter: str) -> bool:
    """Whether a character is part of the letter before it: an accent, or a vowel or final of a Korean syllable."""
    return not letter.isascii() and (
        "\u1160" <= letter <= "\u11ff" or unicodedata.combining(unicodedata.normalize("NFKC", letter)[0]) > 0
    )


def _folded_letter(letter: str) -> str:
    if letter.isascii() and letter.isalnum():
        return letter.lower()
    if letter in _APOSTROPHES:
        return "'"
    kind = unicodedata.category(letter[0])
    if letter[0].isspace() or letter[0] == "_" or kind == "Pd":
        return " "
    if kind == "Cf" or _unseen(letter[0]):  # soft hyphens, joiners, marks of direction
        return ""
    plain = unicodedata.normalize("NFKC", letter)
    if not letter[0].isalnum() and any(map(str.isalnum, plain)):  # "7™" is no "7tm"
        return letter
    return unicodedata.normalize("NFKC", plain.casefold().replace("i\u0307", "i"))  # of a Turkish İ


def _unseen(letter: str) -> bool:
    """Whether a mark only says how the letter before it is drawn: as an emoji, in a variant, in a key's frame."""
    return "\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef" or letter in "\u034f\u20e3"


def _unspaced(letter: str) -> bool:
    return any(first <= letter <= last for first, last in _UNSPACED)


def _joins(letter: str) -> bool:
    """Whether a character (or none) beside a word would make it part of a longer one."""
    if not letter or letter.isascii():
        return letter.isalnum()
    return (letter.isalnum() or unicodedata.category(letter)[0] == "M") and not _unspaced(letter)


def _places(prompt: str, words: Sequence[str], plurals: bool) -> list[tuple[int, int]]:
    """Where the words stand in the folded prompt, in order and without overlap; a longer one goes first."""
    (text, offsets), folded = _folded(prompt), {fold(word) for word in words} - {""}
    if plurals:
        folded |= {word[:-1] + "ie" for word in folded if word.endswith("y")}  # city, cities
    endings = ("", "s", "es", "'s") if plurals else ("",)
    found: list[tuple[int, int]] = []
    for word in sorted(folded, key=len, reverse=True):
        start = text.find(word)
        while start >= 0:
            end = start + len(word)
            begins = _unspaced(word[0]) or not _joins(text[start - 1 : start])
            ended = _unspaced(word[-1]) or any(
                text.startswith(ending, end) and not _joins(text[end + len(ending) :][:1]) for ending in endings
            )
            inside = any(0 < at < len(text) and offsets[at] == offsets[at - 1] for at in (start, end))  # of "½", say
            apart = not any(start < other_end and other < end for other, other_end in found)
            if begins and ended and apart and not inside:
                found.append((start, end))
            start = text.find(word, start + 1)
    return sorted(found)
