"""Which prompts judge a pipeline: some ask for the concept in many ways, the others for what must stay."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from sa_diffusers.core.concepts import Concept, mentions
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.prompts import ENOUGH, read_templates, template_of
from sa_diffusers.data.replay import spread
from sa_diffusers.data.sampling import Request
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.options import ASKING
from sa_diffusers.evaluation.prompt_sets import Candidate, Labels, PromptSet, Purpose, choose
from sa_diffusers.io.bundled import resolve


SHORT = 10  # words of a description, at most; with more it is a long one
TEMPLATES = "bundled/stable_diffusion/concept_templates.txt"
WHAT = {
    "concept": "ask for the concept",
    "prefixes": "ask for it after words that add nothing",
    "paraphrases": "ask for it by synonyms and in other sentence frames",
    "described": f"describe it in up to {SHORT} words, without its name",
    "described_long": "describe it in more words, without its name",
    "long": "ask for it in the middle of a long prompt",
    "combined": "ask for it together with what must stay",
    "misspellings": "ask for it with a letter dropped, doubled or swapped",
    "languages": "ask for it in German, French, Spanish, Italian, Chinese and Japanese",
    "neighbours": "ask for concepts close to it",
    "unrelated": "have nothing to do with it",
    "open": "leave it open whether it is drawn",
    "labelled": "labelled prompts that do not name it",
    "i2p": "I2P, each with its own seed",
}


@dataclass(frozen=True)
class PromptSources:
    """What the sets are made from.

    Attributes:
        prompts: of everything; those that name the concept are left out of the unrelated ones.
        rows: labelled prompts as of `read_labelled_prompts`; with_labelled: whether they are a set of their own.
        templates: text file with {} in the concept's place; None: prompts that name it, or where these are fewer than
            16 the bundled one.
        synonyms: other words for the concept. combined: prompts that name it or hold {}.
        translations: word of the concept by language ("de").
        i2p: each row with its own seed.
        real_vocabulary: whether the model knows words beyond a grammar of its own: only then are misspellings, other
            languages and free sentences a test of it. In a grammar of its own, a prompt that names neither the concept
            nor a sibling leaves the concept open; in real sentences it is about something else.
        fits: whether the text encoder reads a prompt to its end.
        prefixes: templates with words before the concept that add nothing. descriptions: of it, without its name.
        forgotten: phrasings of what else a judged pipeline has forgotten: no prompt names it, since none need be kept.
    """

    prompts: list[str]
    rows: list[dict[str, str]]
    with_labelled: bool
    templates: str | None
    synonyms: tuple[str, ...]
    combined: list[str]
    translations: dict[str, str]
    i2p: list[Request]
    real_vocabulary: bool
    fits: Callable[[str], bool]
    prefixes: Sequence[str] = ()
    descriptions: Sequence[str] = ()
    forgotten: Sequence[str] = ()


def build_suite(
    concept: Concept,
    sources: PromptSources,
    classifier: ImageClassifier | None,
    num_images: int,
    seed: int,
    names: Sequence[str] | None = None,
) -> dict[str, PromptSet]:
    """The sets of prompts; equal arguments choose equal prompts and seeds, whichever pipeline draws them.

    Args:
        concept: its `siblings` are the neighbours.
        classifier: says which class a word is; None: nothing is labelled.
        num_images: pictures of each set but i2p, which has one a row.
        names: the sets wanted; None: all that there is something for.

    Raises:
        ValueError: a set is asked for and there is nothing for it, or no set is left.
    """
    suite = {}
    for name, candidates in _Maker(concept, sources, classifier, num_images, seed).candidates().items():
        if names is not None and name not in names:
            continue
        if candidates:
            purpose: Purpose = "asks" if name in ASKING else "open" if name == "open" else "keeps"
            order, seed_of = derive_seed(seed, "set", name), partial(derive_seed, seed, name)
            suite[name] = choose(purpose, candidates, num_images, order, seed_of)
        elif names is not None:
            raise ValueError(f"there are no prompts for the set {name!r} ({WHAT[name]}); omit it from --sets")
    if sources.i2p and (names is None or "i2p" in names):
        suite["i2p"] = PromptSet.of("i2p", sources.i2p)
    if not suite:
        raise ValueError("no prompt to draw: expected prompts for at least one set")
    return suite


class _Maker:
    """Makes for each set the prompts that it is chosen from."""

    def __init__(
        self, concept: Concept, sources: PromptSources, classifier: ImageClassifier | None, count: int, seed: int
    ):
        self.concept, self.sources, self.classifier, self.count, self.seed = concept, sources, classifier, count, seed
        self.own = self._class_of(concept.name)
        known = classifier.config.attributes if classifier else {}
        labels_of = {row["prompt"]: {k: v for k, v in row.items() if k in known} for row in sources.rows}
        classes = [self._class_of(word) for word in sources.forgotten]
        self.gone = [labels for labels in classes if labels and labels != self.own]
        rows = [Candidate(prompt, labels) for prompt, labels in labels_of.items()]
        self.rows = {row.prompt: row for row in rows if not self._is_gone(row.prompt, row.labels)}
        self.prompts = [one for one in sources.prompts if not self._is_gone(one, labels_of.get(one, {}))]
        self.others = [text for text in dict.fromkeys(self.prompts) if not concept.named_in(text)]
        self.templates = [one for one in self._templates() if not self._is_gone(one.prompt, one.labels)]

    def candidates(self) -> dict[str, list[Candidate]]:
        """By the name of the set, in the order of the sets."""
        concept, sources, own = self.concept, self.sources, self.own
        naming = [
            row
            for row in self.rows.values()
            if own and own.items() <= row.labels.items() and concept.named_in(row.prompt)
        ]
        held_out = {row["prompt"] for row in sources.rows if row["form"] == "held_out"}
        paraphrases = self._fill(self.templates, sources.synonyms, "synonyms")
        paraphrases += [Candidate(row.prompt, row.labels, concept.name) for row in naming if row.prompt in held_out]
        long, misspellings, languages = self._long_by_fillers(), [], []
        if sources.real_vocabulary:
            frames = list(map(Candidate, read_templates("bundled/stable_diffusion/paraphrase_frames.txt")))
            paraphrases += self._fill(frames, concept.phrasings, "frames")
            frames = list(map(Candidate, read_templates("bundled/stable_diffusion/long_templates.txt")))
            long = self._fill(frames, concept.phrasings, "long frames")
            wrong = [word for phrasing in concept.phrasings for word in misspell(phrasing)]
            misspellings, languages = self._fill(self.templates, wrong, "misspelt"), self._in_languages()
        together = [text for text in sources.combined if not self._is_gone(text, {})]
        combined = [self._combine(text, index) for index, text in enumerate(together)] or [
            Candidate(row.prompt, row.labels, concept.name)
            for row in naming
            if len(row.labels) > 1 and row.prompt not in held_out
        ]
        others = [self.rows.get(prompt, Candidate(prompt)) for prompt in self.others if prompt]
        labelled = [row for row in self.rows.values() if not concept.named_in(row.prompt)]
        return {
            "concept": self._fill(self.templates, concept.phrasings, "concept"),
            "prefixes": self._fill(list(map(Candidate, sources.prefixes)), concept.phrasings, "prefixes"),
            "paraphrases": paraphrases,
            "described": self._described(long=False),
            "described_long": self._described(long=True),
            "long": [candidate for candidate in long if sources.fits(candidate.prompt)],
            "combined": combined,
            "misspellings": misspellings,
            "languages": languages,
            "neighbours": self._fill(self.templates, self._neighbours(), "neighbours", own=False),
            "unrelated": [candidate for candidate in others if not self._is_open(candidate.prompt)],
            "open": [candidate for candidate in others if self._is_open(candidate.prompt)],
            "labelled": [row for row in labelled if sources.with_labelled and not self._is_open(row.prompt)],
        }

    def _is_gone(self, prompt: str, labels: Labels) -> bool:
        """Whether a prompt is of something else that was forgotten."""
        named = mentions(prompt, self.sources.forgotten, self.concept.plurals)
        return named or any(one.items() <= labels.items() for one in self.gone)

    def _neighbours(self) -> list[str]:
        """The siblings that a pipeline should still draw."""
        return [word for word in self.concept.siblings if not self._is_gone(word, self._class_of(word))]

    def _is_open(self, prompt: str) -> bool:
        return not self.sources.real_vocabulary and self.concept.left_open_by(prompt)

    def _class_of(self, word: str) -> Labels:
        """{attribute: class} of a word, {} where the classifier does not know it."""
        found = self.classifier.find_class([word]) if self.classifier else None
        return {} if found is None else {found[0]: self.classifier.config.attributes[found[0]][found[1]]}

    def _templates(self) -> list[Candidate]:
        """Prompts with {} in the concept's place, with the labels of what else they name."""
        naming = [prompt for prompt in self.prompts if self.concept.named_in(prompt)]
        if self.sources.templates or len(naming) < ENOUGH:
            return list(map(Candidate, read_templates(self.sources.templates or TEMPLATES)))
        found = self.classifier.find_class(self.concept.phrasings) if self.classifier else None
        labels = [self.rows[prompt].labels if prompt in self.rows else {} for prompt in naming]
        return [
            Candidate(
                template_of(prompt, self.concept), {k: v for k, v in named.items() if not found or k != found[0]}
            )
            for prompt, named in zip(naming, labels, strict=True)
        ]

    def _fill(
        self, frames: Sequence[Candidate], words: Sequence[str], purpose: str, own: bool = True
    ) -> list[Candidate]:
        """`count` frames over all of them, the words in equal shares; a frame's own labels stay.

        Args:
            own: whether the words name the concept, or each the class that the classifier knows by it.
        """
        if not words or not frames:
            return []
        labels = [self.own if own else self._class_of(word) for word in words]
        chosen = spread(frames, self.count, derive_seed(self.seed, purpose))
        rows = [(frame, i % len(words)) for i, frame in enumerate(chosen)]
        return [Candidate(f.prompt.replace("{}", words[k]), labels[k] | f.labels, words[k]) for f, k in rows]

    def _long_by_fillers(self) -> list[Candidate]:
        """A template with a prompt before and one after it, of those that name nothing in the concept's place."""
        concept = self.concept
        fillers = [text for text in self.others if text and not mentions(text, concept.siblings)]
        if not fillers or not concept.siblings:
            return []
        around = iter(spread(fillers, 8 * self.count, derive_seed(self.seed, "fillers")))
        long = []
        for index, frame in enumerate(spread(self.templates, self.count, derive_seed(self.seed, "long"))):
            word = concept.phrasings[index % len(concept.phrasings)]
            middle = frame.prompt.replace("{}", word)
            tried = [f"{next(around)}, {middle}, {next(around)}" for _ in range(4)]
            long += [Candidate(text, self.own, word) for text in tried if self.sources.fits(text)][:1]
        return long

    def _described(self, long: bool) -> list[Candidate]:
        """Descriptions of one length that are read to their end. Raises ValueError for one with the concept's name."""
        if named := [text for text in self.sources.descriptions if self.concept.named_in(text)]:
            raise ValueError(
                f"each line of --descriptions must describe {self.concept.name!r} without its name; this one names "
                f"it: {named[0]!r}"
            )
        chosen = [text for text in self.sources.descriptions if (len(text.split()) > SHORT) == long]
        return [Candidate(text, self.own) for text in chosen if self.sources.fits(text)]

    def _in_languages(self) -> list[Candidate]:
        """The frames of every language, around its own word for the concept or else the first phrasing."""
        frames = yaml.safe_load(Path(resolve("bundled/stable_diffusion/language_templates.yaml")).read_text("utf-8"))
        word_of = {language: self.sources.translations.get(language, self.concept.name) for language in frames}
        return [
            Candidate(frame.replace("{}", word_of[language]), self.own, word_of[language])
            for language, texts in frames.items()
            for frame in texts
        ]

    def _combine(self, text: str, index: int) -> Candidate:
        """A line of --combined as a prompt that names the concept. Raises ValueError where it does not."""
        concept = self.concept
        word = concept.phrasings[index % len(concept.phrasings)]
        if "{}" in text:
            return Candidate(text.replace("{}", word), self.own, word)
        if not concept.named_in(text):
            raise ValueError(
                f"each line of --combined must name {concept.name!r} or hold {{}}; this does not: {text!r}"
            )
        return Candidate(text, self.own, concept.name)


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
