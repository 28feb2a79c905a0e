"""The concept as a user gives it, completed by what ships, its surrogate looked at."""

from pathlib import Path

import yaml

from sa_diffusers.core.concepts import Concept, mentions, split_phrasings
from sa_diffusers.io.bundled import resolve


def find_concept(concept: str, surrogate: str | None, siblings: str | None = None) -> Concept:
    """The concept as the user gave it, completed from `assets/surrogates.yaml`.

    Raises:
        ValueError: no surrogate was given and the file knows none for this concept, or it names the concept itself.
    """
    phrasings = split_phrasings(concept)
    file = yaml.safe_load(Path(resolve("bundled/surrogates.yaml")).read_text())
    known = {p.lower(): entry for entry in file["concepts"].values() for p in split_phrasings(entry["concept"])}
    entry = next((known[p.lower()] for p in phrasings if p.lower() in known), {})
    surrogate = entry.get("surrogate") if surrogate is None else surrogate.strip()
    if not surrogate:
        raise ValueError(
            f"no surrogate is known for {phrasings[0]!r}: say what to draw in its place with --surrogate, a prompt "
            "('a middle aged man'), a folder of images, or noise"
        )
    named = [p for p in phrasings if mentions(surrogate, [p])]
    if looks_like_path(surrogate) and not is_folder(surrogate):
        raise ValueError(f"no folder {surrogate}; a surrogate is a prompt, an existing folder of images, or noise")
    if named and not is_folder(surrogate):
        raise ValueError(f"the surrogate {surrogate!r} names the concept ({named[0]!r}): nothing would be forgotten")
    siblings = siblings or file["siblings"].get(entry.get("kind"))
    others = split_phrasings(siblings) if siblings else ()
    kind = "noise" if surrogate == "noise" else "images" if is_folder(surrogate) else "prompt"
    return Concept(phrasings, surrogate, tuple(word for word in others if not mentions(word, phrasings)), kind)


def is_folder(text: str) -> bool:
    """Whether a surrogate is a folder; a prompt may be longer than any file name, which is an error to ask about."""
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def looks_like_path(text: str) -> bool:
    """Whether somebody who wrote this meant a path: "./pictures", "/data/pictures", "~/pictures", "data/pictures"."""
    return text.startswith((".", "/", "~")) or ("/" in text and " " not in text)
