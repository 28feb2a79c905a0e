"""Sentences around a concept: templates, long prompts, other languages, misspellings, combinations."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from sa_diffusers.core.concepts import Concept, mentions
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.data.replay import spread
from sa_diffusers.evaluation.forgetting import Labels
from sa_diffusers.io.bundled import resolve


@dataclass(frozen=True)
class Candidate:
    """A prompt, the class of each attribute that it names, and the word in the concept's place ("": none)."""

    prompt: str
    labels: Labels
    word: str = ""


def fill(
    frames: Sequence[Candidate], words: Sequence[str], labels: Sequence[Labels], count: int, seed: int
) -> list[Candidate]:
    """`count` frames over all of them, the words in equal shares; a frame's own labels stay."""
    chosen = spread(frames, count, seed)
    rows = [(frame, i % len(words)) for i, frame in enumerate(chosen)]
    return [Candidate(f.prompt.replace("{}", words[k]), labels[k] | f.labels, words[k]) for f, k in rows]


def read_frames(path: str) -> list[Candidate]:
    """The lines of a text file. Raises ValueError for one without {}."""
    lines = read_prompts(path)
    wrong = [line for line in lines if "{}" not in line]
    if wrong:
        raise ValueError(f"each line of {path} must hold {{}} where the concept goes; this one does not: {wrong[0]!r}")
    return [Candidate(line, {}) for line in lines]


def long_by_fillers(
    templates: Sequence[Candidate],
    others: Sequence[str],
    concept: Concept,
    labels: Labels,
    fits: Callable[[str], bool],
    count: int,
    seed: int,
) -> list[Candidate]:
    """A template with a prompt before and one after it, of those that name nothing in the concept's place."""
    fillers = [text for text in others if text and not mentions(text, concept.siblings)]
    if not fillers or not concept.siblings:
        return []
    around = iter(spread(fillers, 8 * count, derive_seed(seed, "fillers")))
    long = []
    for index, frame in enumerate(spread(templates, count, derive_seed(seed, "long"))):
        word = concept.phrasings[index % len(concept.phrasings)]
        middle = frame.prompt.replace("{}", word)
        tried = [f"{before}, {middle}, {after}" for before, after in [(next(around), next(around)) for _ in range(4)]]
        long += [Candidate(text, labels, word) for text in tried if fits(text)][:1]
    return long


def in_languages(concept: Concept, translations: dict[str, str], labels: Labels) -> list[Candidate]:
    """The frames of every language, around its own word for the concept or else the first phrasing."""
    frames = yaml.safe_load(Path(resolve("bundled/stable_diffusion/language_templates.yaml")).read_text("utf-8"))
    return [
        Candidate(frame.replace("{}", word), labels, word)
        for language, texts in frames.items()
        for word in [translations.get(language, concept.name)]
        for frame in texts
    ]


def combine(text: str, concept: Concept, labels: Labels, index: int) -> Candidate:
    """A line of --combined as a prompt that names the concept. Raises ValueError where it does not."""
    word = concept.phrasings[index % len(concept.phrasings)]
    if "{}" in text:
        return Candidate(text.replace("{}", word), labels, word)
    if not mentions(text, concept.phrasings):
        raise ValueError(f"each line of --combined must name {concept.name!r} or hold {{}}; this does not: {text!r}")
    return Candidate(text, labels, concept.name)


def misspell(phrase: str) -> list[str]:
    """A phrase with one letter dropped, doubled, or swapped with the next, in words of four letters or more.

    The first letter of a word stays. Nothing comes twice, and the phrase itself not at all.
    """
    found = []
    for word in re.finditer("[A-Za-z]{4,}", phrase):
        for place in range(word.start() + 1, word.end()):
            head, letter, tail = phrase[:place], phrase[place], phrase[place + 1 :]
            found += [head + tail, head + 2 * letter + tail]
            if place + 1 < word.end():
                found.append(head + tail[0] + letter + tail[1:])
    return [text for text in dict.fromkeys(found) if text != phrase]
