"""A grammar of captions for coloured handwritten digits.

`caption` composes a caption from independent choices (sentence frame, word order, synonyms, filler words, capitals,
numerals), so that a text encoder trained on it must learn the words and not a few templates. Sentence frames and verbs
of `assets/digits/heldout_templates.txt` are never produced: they measure whether it did.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import read_yaml


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "ink": ("red", "yellow", "green", "cyan", "blue", "pink"),
    "background": ("black", "gray", "white"),
    "stroke": ("thin", "bold"),
}

# Every word by which a caption may name a class; the first is its name.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "digit": {name: (name, str(number)) for number, name in enumerate(ATTRIBUTES["digit"])},
    "ink": {name: (name,) for name in ATTRIBUTES["ink"]},
    "background": {"black": ("black",), "gray": ("gray", "grey"), "white": ("white",)},
    "stroke": {"thin": ("thin", "fine"), "bold": ("bold", "thick")},
}

_PARTS = SimpleNamespace(**read_yaml("bundled/digits/captions.yaml"))  # words and phrases, by their place
_MEANINGFUL = {word for classes in WORDS.values() for words in classes.values() for word in words}


def held_out_templates() -> list[str]:
    """Sentence frames that `caption` never produces, with the slots {digit}, {ink}, {background} and {stroke}."""
    lines = Path(resolve("bundled/digits/heldout_templates.txt")).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def fill(template: str, attributes: dict[str, str], rng: random.Random) -> str:
    """Fill a held-out template, each class named by one of its words at random."""
    return template.format(**{key: rng.choice(WORDS[key][value]) for key, value in attributes.items()})


def random_attributes(rng: random.Random, exclude: Sequence[str] = ()) -> dict[str, str]:
    """One class of every attribute, uniformly among those that are not excluded."""
    return {key: rng.choice([name for name in names if name not in exclude]) for key, names in ATTRIBUTES.items()}


def caption(attributes: dict[str, str], rng: random.Random, keep: float = 0.75) -> str:
    """Compose a caption that names each attribute with probability `keep`.

    Args:
        attributes: class of each attribute, as in `ATTRIBUTES`; an attribute that is missing is never named.
        rng: source of every choice, so that equal states give equal captions.
    """
    words = {key: rng.choice(WORDS[key][value]) for key, value in attributes.items() if rng.random() < keep}
    text = rng.choice((_sentence, _sentence, _sentence, _tags, _clauses))(words, rng)
    if rng.random() < 0.2:
        text = _insert_pseudo_words(text, rng)
    return rng.choice((text, text, text, text.capitalize(), text.upper()))


def _sentence(words: dict[str, str], rng: random.Random) -> str:
    if rng.random() < 0.4:
        frame = " ".join(filter(None, (rng.choice(_PARTS.requests), rng.choice(_PARTS.verbs))))
    else:
        frame = rng.choice(("", *_PARTS.openers))
    parts = (frame, rng.choice(("a", "a", "the", "this", "")), _noun_phrase(words, rng), rng.choice(_PARTS.closers))
    return " ".join(filter(None, parts))


def _noun_phrase(words: dict[str, str], rng: random.Random) -> str:
    """Stroke and ink before or after the noun, the background after it, the tail in any order."""
    before, tail = [], []
    if "stroke" in words:
        (
            before.append(words["stroke"])
            if rng.random() < 0.5
            else tail.append(_phrase(_PARTS.stroke, words["stroke"], rng))
        )
    if "ink" in words:
        (before.append(words["ink"]) if rng.random() < 0.5 else tail.append(_phrase(_PARTS.ink, words["ink"], rng)))
    if "background" in words:
        tail.append(_phrase(_PARTS.background, words["background"], rng))
    if rng.random() < 0.3:
        before.append(rng.choice(_PARTS.fillers))
    rng.shuffle(before)
    rng.shuffle(tail)
    joiner = rng.choice((" ", " ", ", ", " and "))
    return " ".join(filter(None, (*before, _noun(words, rng), joiner.join(tail))))


def _noun(words: dict[str, str], rng: random.Random) -> str:
    if "digit" not in words:
        return rng.choice(_PARTS.nouns)
    return rng.choice((words["digit"], words["digit"], f"{rng.choice(_PARTS.nouns)} {words['digit']}"))


def _phrase(forms: Sequence[str], word: str, rng: random.Random) -> str:
    return rng.choice(forms).format(word)


def _tags(words: dict[str, str], rng: random.Random) -> str:
    """Keywords in any order: "seven, red ink, black background"."""
    tags = []
    if "digit" in words:
        tags.append(_noun(words, rng))
    if "ink" in words:
        tags.append(words["ink"] + rng.choice(("", " ink", " pen", " colour")))
    if "background" in words:
        tags.append(words["background"] + rng.choice((" background", " paper", " backdrop", " canvas")))
    if "stroke" in words:
        tags.append(words["stroke"] + rng.choice(("", " strokes", " lines", " pen")))
    if rng.random() < 0.3 or not tags:
        tags.append(rng.choice(_PARTS.fillers))
    rng.shuffle(tags)
    return rng.choice((", ", ", ", " ", "; ", " / ")).join(tags)


def _clauses(words: dict[str, str], rng: random.Random) -> str:
    """A clause an attribute: "the digit is seven and its ink is red"."""
    clauses = []
    if "digit" in words:
        noun = rng.choice(_PARTS.nouns)
        clauses.append(rng.choice((f"the {noun} is {words['digit']}", f"{noun}: {words['digit']}")))
    if "ink" in words:
        clauses.append(_phrase(("the ink is {}", "its colour is {}", "ink: {}", "the pen is {}"), words["ink"], rng))
    if "background" in words:
        forms = ("the background is {}", "background: {}", "the paper is {}")
        clauses.append(_phrase(forms, words["background"], rng))
    if "stroke" in words:
        clauses.append(_phrase(("the strokes are {}", "stroke: {}", "its lines are {}"), words["stroke"], rng))
    if not clauses:
        clauses.append(f"some {rng.choice(_PARTS.nouns)}")
    rng.shuffle(clauses)
    return rng.choice((", ", " and ", "; ", ". ")).join(clauses)


def _insert_pseudo_words(text: str, rng: random.Random) -> str:
    """Put one to three made-up words into the caption: a word never seen must not disturb the words that matter."""
    words = text.split(" ")
    for _ in range(rng.randint(1, 3)):
        made_up = "".join(
            rng.choice("bcdfghjklmnprstvw") + rng.choice("aeiou") + rng.choice(("", "", "n", "s", "r", "t", "l"))
            for _ in range(rng.randint(1, 3))
        )
        position = rng.randint(0, len(words))
        if made_up not in _MEANINGFUL:
            words.insert(position, made_up)
    return " ".join(words)
