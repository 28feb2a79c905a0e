"""Words that could take a concept's place where the model is to choose."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from sa_diffusers.core.concepts import Concept, Concepts, fold, mentions, split_phrasings
from sa_diffusers.data.prompts import read_prompts


AUTO = "auto"  # the surrogate that leaves the choice to the model; auto:3 tries three
TRIED = 8  # words at most
WORDS = "bundled/surrogate_words.txt"
MOST = 400  # of the words of prompts, the most frequent
SMALL = 5000  # entries of a vocabulary that is looked through


def tries(surrogate: str | None) -> int:
    """How many words are tried; 1: one is chosen without; 0: it is a surrogate. Raises ValueError: no such number."""
    name, colon, count = fold(surrogate or "").partition(":")
    if name != AUTO:
        return 0
    if colon and not (count.isdecimal() and 2 <= int(count) <= TRIED):
        raise ValueError(f"expected auto, or auto:3 to try so many of 2 to {TRIED} words; got {surrogate!r}")
    return int(count or 1)


def candidates(concept: Concept, concepts: Concepts, prompts: Sequence[str], vocabulary: Iterable[str]) -> list[str]:
    """The concept's siblings, general words that ship, and those of the prompts and of a vocabulary, each once.

    Left out are words that name a concept of the run, and those that stand beside this one in a prompt: such a word
    says something else than the concept does, and goes with it ("red" of "a red seven").
    """
    counts = Counter(word for prompt in prompts for word in words_of(prompt))
    said = [word for word, _ in counts.most_common(MOST)]
    beside = {word for prompt in prompts if concept.named_in(prompt) for word in words_of(prompt)}
    others = [word for word in (*read_prompts(WORDS), *said, *vocabulary) if not beside.issuperset(words_of(word))]
    found: dict[str, str] = {}
    for word in (*concept.siblings, *others):
        found.setdefault(fold(word), word)
    return [word for word in found.values() if not concepts.named_in(word)]


def phrasings_of(forgotten: Iterable[str]) -> list[str]:
    """The phrasings of all that a model has forgotten, as its records say it ("seven, 7; red"), each once."""
    parts = (part for said in forgotten for part in said.split(";"))
    return list(dict.fromkeys(phrasing for part in parts for phrasing in split_phrasings(part)))


def not_forgotten(words: Sequence[str], forgotten: Sequence[str]) -> list[str]:
    """The words that name nothing of what a model has forgotten; see `phrasings_of`."""
    gone = phrasings_of(forgotten)
    return [word for word in words if not mentions(word, gone)]


def forgotten_besides(forgotten: Iterable[str], concepts: Concepts) -> tuple[str, ...]:
    """The phrasings of what a model has forgotten that is none of some concepts; see `phrasings_of`."""
    gone = phrasings_of(forgotten)
    return tuple(word for word in gone if not (concepts.named_in(word) or mentions(concepts.said, [word])))


def words_of(text: str) -> list[str]:
    """Its words of three letters or more, as they are compared."""
    return re.findall(r"[^\W\d_]{3,}", fold(text))


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The whole words of a small tokenizer; none of a large one, whose rare words a model knows little of."""
    if len(tokenizer) > SMALL:
        return []
    found = (re.fullmatch(r"[▁Ġ]([^\W\d_]{3,})|([^\W\d_]{3,})</w>", token) for token in tokenizer.get_vocab())
    return sorted(match[1] or match[2] for match in found if match)
