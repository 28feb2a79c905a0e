"""Concepts to forget, and prompts: whether one names them, and what it says with surrogates in their places."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal


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
    def said(self) -> str:
        """As a user gives it."""
        return ", ".join(self.phrasings)

    def named_in(self, prompt: str) -> bool:
        """Whether a prompt asks for it; see `mentions`."""
        return mentions(prompt, self.phrasings, self.plurals)

    def replaced_in(self, prompt: str, replacement: str) -> str:
        """What a prompt says with something else in its place; see `substitute`."""
        return substitute(prompt, dict.fromkeys(self.phrasings, replacement), self.plurals)

    def left_open_by(self, prompt: str) -> bool:
        """Whether the model may draw it although the prompt does not ask for it: the empty prompt always does, and
        where the concept has siblings (another digit for a digit) every prompt that names none of them."""
        if self.named_in(prompt):
            return False
        return not prompt.strip() or bool(self.siblings and not mentions(prompt, self.siblings))


class Concepts(tuple[Concept, ...]):
    """All that a run forgets, one concept or several, whose surrogates are of one kind."""

    @property
    def name(self) -> str:
        """A short one for all."""
        return self[0].name + (f" and {len(self) - 1} more" if self[1:] else "")

    @property
    def said(self) -> str:
        return "; ".join(one.said for one in self)

    @property
    def surrogate_kind(self) -> str:
        return self[0].surrogate_kind

    @property
    def key(self) -> dict[str, Any]:
        """What decides which prompts name them."""
        return {"phrasings": self.each("phrasings")} | ({"plurals": True} if self[0].plurals else {})

    def each(self, attribute: str) -> Any:
        """An attribute of each, ready for JSON; of one alone the value itself, as keys of runs hold it."""
        return lone([list(v) if isinstance(v, tuple) else v for v in (getattr(one, attribute) for one in self)])

    def siblings_of(self, one: Concept) -> tuple[str, ...]:
        """The siblings of one that stay: they name none of them."""
        return tuple(word for word in one.siblings if not self.named_in(word))

    def named_in(self, prompt: str) -> bool:
        """Whether a prompt asks for any of them."""
        return any(one.named_in(prompt) for one in self)

    def left_open_by(self, prompt: str) -> bool:
        """Whether a prompt could show each of them."""
        return all(one.left_open_by(prompt) for one in self)

    def replaced_in(self, prompt: str) -> str:
        """What a prompt says with every surrogate in its concept's place, all put in at once."""
        surrogates = {phrasing: one.surrogate for one in self for phrasing in one.phrasings}
        return substitute(prompt, surrogates, self[0].plurals)


def lone(values: Sequence[Any]) -> Any:
    """The one value, or all of several."""
    return values[0] if len(values) == 1 else values


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


def split_translations(text: str, languages: Sequence[str]) -> dict[str, str]:
    """ "de: Hund, fr: chien" -> {"de": "Hund", "fr": "chien"}. Raises ValueError for another form or language."""
    pairs = [part.partition(":") for part in text.split(",") if part.strip()]
    if any(not (language.strip() in languages and word.strip()) for language, _, word in pairs):
        raise ValueError(f"expected --translations as 'de: Hund, fr: chien', of {', '.join(languages)}; got {text!r}")
    return {language.strip(): word.strip() for language, _, word in pairs}


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


def substitute(prompt: str, replacements: Mapping[str, str], plurals: bool = False) -> str:
    """Put what replaces it in the place of each word or phrase in a prompt; an ending of a plural stays."""
    offsets = _folded(prompt)[1]
    for start, end, word in reversed(_places(prompt, replacements, plurals)):
        prompt = prompt[: offsets[start]] + replacements[word] + prompt[offsets[end] :]
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


def _places(prompt: str, words: Iterable[str], plurals: bool) -> list[tuple[int, int, str]]:
    """Where which word stands in the folded prompt, in order and without overlap; a longer one goes first."""
    (text, offsets), folded = _folded(prompt), {fold(word): word for word in words}
    folded.pop("", None)
    if plurals:
        folded |= {form[:-1] + "ie": word for form, word in folded.items() if form.endswith("y")}  # city, cities
    endings = ("", "s", "es", "'s") if plurals else ("",)
    found: list[tuple[int, int, str]] = []
    for word in sorted(folded, key=len, reverse=True):
        start = text.find(word)
        while start >= 0:
            end = start + len(word)
            begins = _unspaced(word[0]) or not _joins(text[start - 1 : start])
            ended = _unspaced(word[-1]) or any(
                text.startswith(ending, end) and not _joins(text[end + len(ending) :][:1]) for ending in endings
            )
            inside = any(0 < at < len(text) and offsets[at] == offsets[at - 1] for at in (start, end))  # of "½", say
            apart = not any(start < other_end and other < end for other, other_end, _ in found)
            if begins and ended and apart and not inside:
                found.append((start, end, folded[word]))
            start = text.find(word, start + 1)
    return sorted(found)
