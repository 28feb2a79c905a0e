"""Which prompts judge a pipeline: some ask for the concept in many ways, the others for what must stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sa_diffusers.core.concepts import Concept, mentions, substitute
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.prompts import concept_templates
from sa_diffusers.data.replay import leaves_open, spread
from sa_diffusers.data.sampling import Request
from sa_diffusers.evaluation.forgetting import Labels
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.prompts.prompt_variants import (
    Candidate,
    combine,
    fill,
    in_languages,
    long_by_fillers,
    misspell,
    read_frames,
)
from sa_diffusers.evaluation.suite.options import ASKING


Purpose = Literal["asks", "keeps", "open", "i2p"]
WHAT = {
    "concept": "ask for the concept",
    "paraphrases": "ask for it by synonyms and in other sentence frames",
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
class PromptSet:
    """Prompts of one purpose: request i draws a picture that should show `labels[i]`, and `words[i]` if not ""."""

    name: str
    purpose: Purpose
    requests: list[Request]
    labels: list[Labels]
    words: list[str]

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True)
class PromptSources:
    """What the sets are made from.

    Attributes:
        prompts: of everything; those that name the concept are left out of the unrelated ones.
        rows: labelled prompts as of `read_labelled_prompts`; with_labelled: whether they are a set of their own.
        templates: text file with {} in the concept's place, used where fewer than 16 prompts name it; given: always.
        synonyms: other words for the concept. combined: prompts that name it or hold {}.
        translations: word of the concept by language ("de").
        i2p: (prompt, seed) of each row.
        real_vocabulary: whether the model knows words beyond a grammar of its own: only then are misspellings, other
            languages and free sentences a test of it. In a grammar of its own, a prompt that names neither the concept
            nor a sibling leaves the concept open; in real sentences it is about something else.
        fits: whether the text encoder reads a prompt to its end.
    """

    prompts: list[str]
    rows: list[dict[str, str]]
    with_labelled: bool
    templates: str
    given_templates: bool
    synonyms: tuple[str, ...]
    combined: list[str]
    translations: dict[str, str]
    i2p: list[tuple[str, int]]
    real_vocabulary: bool
    fits: Callable[[str], bool]


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
    for name, candidates in _candidates(concept, sources, classifier, num_images, seed).items():
        if names is not None and name not in names:
            continue
        if candidates:
            suite[name] = _choose(name, candidates, num_images, seed)
        elif names is not None:
            raise ValueError(f"there are no prompts for the set {name!r} ({WHAT[name]}); leave it out of --sets")
    if sources.i2p and (names is None or "i2p" in names):
        requests = [Request(prompt, row_seed) for prompt, row_seed in sources.i2p]
        suite["i2p"] = PromptSet("i2p", "i2p", requests, [{}] * len(requests), [""] * len(requests))
    if not suite:
        raise ValueError("no prompt to draw: expected prompts for at least one set")
    return suite


def _candidates(
    concept: Concept, sources: PromptSources, classifier: ImageClassifier | None, count: int, seed: int
) -> dict[str, list[Candidate]]:
    """For each set the prompts that it is chosen from."""
    found = classifier.find_class(list(concept.phrasings)) if classifier else None
    own = _class_labels(classifier, concept.name)
    rows = _known_rows(sources.rows, classifier)
    labels_of = {row.prompt: row.labels for row in rows.values()}
    templates = _templates(concept, sources, labels_of, found and found[0])
    others = [prompt for prompt in dict.fromkeys(sources.prompts) if not mentions(prompt, concept.phrasings)]

    def is_open(prompt: str) -> bool:
        return not sources.real_vocabulary and leaves_open(prompt, concept)

    naming = [row for row in rows.values() if own and own.items() <= row.labels.items()]
    naming = [row for row in naming if mentions(row.prompt, concept.phrasings)]
    held_out = {row["prompt"] for row in sources.rows if row["form"] == "held_out"}

    def asking(frames: Sequence[Candidate], words: Sequence[str], purpose: str) -> list[Candidate]:
        return fill(frames, words, [own] * len(words), count, derive_seed(seed, purpose))

    paraphrases = asking(templates, sources.synonyms, "synonyms") if sources.synonyms else []
    paraphrases += [Candidate(row.prompt, row.labels, concept.name) for row in naming if row.prompt in held_out]
    long = long_by_fillers(templates, others, concept, own, sources.fits, count, seed)
    misspellings, languages = [], []
    if sources.real_vocabulary:
        frames = read_frames("bundled/stable_diffusion/paraphrase_frames.txt")
        paraphrases += asking(frames, concept.phrasings, "frames")
        long = asking(read_frames("bundled/stable_diffusion/long_templates.txt"), concept.phrasings, "long frames")
        wrong = [word for phrasing in concept.phrasings for word in misspell(phrasing)]
        misspellings = asking(templates, wrong, "misspelt") if wrong else []
        languages = in_languages(concept, sources.translations, own)
    combined = [combine(text, concept, own, i) for i, text in enumerate(sources.combined)]
    if not combined:
        combined = [Candidate(r.prompt, r.labels, concept.name) for r in naming
                    if len(r.labels) > 1 and r.prompt not in held_out]  # fmt: skip
    neighbours = []
    if concept.siblings:
        classes = [_class_labels(classifier, word) for word in concept.siblings]
        neighbours = fill(templates, concept.siblings, classes, count, derive_seed(seed, "neighbours"))
    return {
        "concept": asking(templates, concept.phrasings, "concept"),
        "paraphrases": paraphrases,
        "long": [candidate for candidate in long if sources.fits(candidate.prompt)],
        "combined": combined,
        "misspellings": misspellings,
        "languages": languages,
        "neighbours": neighbours,
        "unrelated": [Candidate(p, labels_of.get(p, {})) for p in others if p and not is_open(p)],
        "open": [Candidate(p, labels_of.get(p, {})) for p in others if p and is_open(p)],
        "labelled": [
            row
            for row in rows.values()
            if sources.with_labelled and not mentions(row.prompt, concept.phrasings) and not is_open(row.prompt)
        ],  # fmt: skip
    }


def _choose(name: str, candidates: Sequence[Candidate], count: int, seed: int) -> PromptSet:
    """`count` of the candidates, each once before any comes again; request i has the seed of (seed, name, i)."""
    indices = {candidate.prompt: index for index, candidate in enumerate(candidates)}  # each prompt once
    chosen = [candidates[indices[prompt]] for prompt in spread(list(indices), count, derive_seed(seed, "set", name))]
    requests = [Request(c.prompt, derive_seed(seed, name, i)) for i, c in enumerate(chosen)]
    purpose: Purpose = "asks" if name in ASKING else "open" if name == "open" else "keeps"
    return PromptSet(name, purpose, requests, [c.labels for c in chosen], [c.word for c in chosen])


def _templates(
    concept: Concept, sources: PromptSources, labels_of: dict[str, Labels], attribute: str | None
) -> list[Candidate]:
    """Prompts with {} in the concept's place, with the labels of what else they name."""
    if sources.given_templates:
        return read_frames(sources.templates)
    naming = [prompt for prompt in sources.prompts if mentions(prompt, concept.phrasings)]
    if len(naming) < 16:
        return [Candidate(text, {}) for text in concept_templates(concept, naming, sources.templates)]
    cleaned = [(prompt, prompt.replace("{", "").replace("}", "")) for prompt in naming]
    return [
        Candidate(
            substitute(text, concept.phrasings, "{}"),
            {k: v for k, v in labels_of.get(prompt, {}).items() if k != attribute},
        )
        for prompt, text in cleaned
    ]


def _known_rows(rows: Sequence[dict[str, str]], classifier: ImageClassifier | None) -> dict[str, Candidate]:
    """By its prompt each labelled row, with the labels that the classifier can judge."""
    known = classifier.config.attributes if classifier else {}
    return {row["prompt"]: Candidate(row["prompt"], {k: v for k, v in row.items() if k in known}) for row in rows}


def _class_labels(classifier: ImageClassifier | None, word: str) -> Labels:
    """{attribute: class} of a word, {} where the classifier does not know it."""
    found = classifier.find_class([word]) if classifier else None
    return {} if found is None else {found[0]: classifier.config.attributes[found[0]][found[1]]}
