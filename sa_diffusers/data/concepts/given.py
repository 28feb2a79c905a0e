"""The concept as a user gives it, completed by what ships, its surrogate looked at."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sa_diffusers.core.concepts import Concept, Concepts, fold, mentions, split_phrasings
from sa_diffusers.data.concepts.candidates import tries
from sa_diffusers.io.bundled import resolve


def find_concept(
    concept: str, surrogate: str | None = None, siblings: str | None = None, plurals: bool = False
) -> Concept:
    """The concept as the user gave it, completed from `assets/surrogates.yaml`; see `check_surrogate` for the rest.

    A surrogate is a folder only where it is written as a path: a word stays a word, whatever folders there are.

    Raises:
        ValueError: no words for the concept or its siblings.
    """
    phrasings = split_phrasings(concept)
    file = _bundled()
    known = {fold(p): entry for entry in file["concepts"].values() for p in split_phrasings(entry["concept"])}
    entry = next((known[fold(p)] for p in phrasings if fold(p) in known), {})
    surrogate = entry.get("surrogate") if surrogate is None else surrogate.strip()
    siblings = siblings or file["siblings"].get(entry.get("kind"))
    others = split_phrasings(siblings, "--siblings") if siblings else ()
    written = surrogate or ""
    path = ("/" in written or written in (".", "..")) and is_folder(written)
    kind = "noise" if fold(written) == "noise" else "images" if path else "prompt"
    others = tuple(word for word in others if not mentions(word, phrasings, plurals))
    return Concept(phrasings, surrogate, others, kind, plurals)


def siblings_of(kind: str) -> str | None:
    """What can stand in the place of a concept of a kind; None where the kind has none. Raises ValueError: unknown."""
    kinds = {entry["kind"] for entry in _bundled()["concepts"].values()}
    if kind not in kinds:
        raise ValueError(f"nothing is known of the kind {kind!r}; give its siblings, or one of {', '.join(kinds)}")
    return _bundled()["siblings"].get(kind)


@cache
def _bundled() -> dict[str, Any]:
    return yaml.safe_load(Path(resolve("bundled/surrogates.yaml")).read_text(encoding="utf-8"))


def check_surrogate(concept: Concept, may_be_empty: bool = False) -> None:
    """Refuse what cannot take the concept's place.

    Args:
        may_be_empty: whether "" stands for nothing in particular.

    Raises:
        ValueError: none was given and none is known, a folder that does not exist, or a text that names the concept.
    """
    surrogate, kinds = concept.surrogate, "a prompt ('a middle aged man'), a folder of images (./pictures), or noise"
    if surrogate is None:
        raise ValueError(
            f"no surrogate is known for {concept.name!r}: say what to draw in its place with --surrogate, {kinds}"
        )
    if not surrogate and not may_be_empty:
        raise ValueError(f"expected a surrogate, got an empty one; pass --surrogate with {kinds}")
    if concept.surrogate_kind != "prompt":
        return
    if _meant_as_path(surrogate):
        raise ValueError(f"no folder {surrogate}; a surrogate is {kinds}")
    tries(surrogate)
    if "{}" in surrogate:
        raise ValueError(f"expected a surrogate in words, without the {{}} of a template, got {surrogate!r}")
    named = [p for p in concept.phrasings if mentions(surrogate, [p], concept.plurals)]
    if named:
        raise ValueError(f"the surrogate {surrogate!r} names the concept ({named[0]!r}): nothing would be forgotten")


def describe_surrogates(concepts: Concepts) -> str:
    """What takes the place of the first, and of how many more something does."""
    more = f", and of {len(concepts) - 1} more concepts" if concepts[1:] else ""
    return describe_surrogate(concepts[0]) + more


def describe_surrogate(concept: Concept) -> str:
    """What takes the concept's place, and as which of its kinds it was read."""
    surrogate = concept.surrogate
    if concept.surrogate_kind == "noise" or not surrogate:
        return "noise" if surrogate else "nothing in particular"
    if concept.surrogate_kind == "images":
        return f"the folder {surrogate}"
    beside = f" (to take the folder of this name, write ./{surrogate})" if is_folder(surrogate) else ""
    return f"the text {surrogate!r}{beside}"


def is_folder(text: str) -> bool:
    """Whether a text names a folder; a prompt may be longer than any file name, which is an error to ask about."""
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def _meant_as_path(text: str) -> bool:
    """Whether somebody who wrote this meant a folder: "./pictures", "/data/pictures", or "data/pictures" with a data/.

    Not so "man/woman", "24/7" or ".hack".
    """
    first, slash, _ = text.partition("/")
    return bool(slash) and (
        first in ("", ".", "..") or first[0] == "~" or text[-1] == "/" or " " not in text and is_folder(first)
    )
