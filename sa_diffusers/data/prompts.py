"""What a prompt says: whether it names the concept, and what it would say with the surrogate in its place."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from sa_diffusers.io.bundled import resolve


@dataclass(frozen=True)
class Concept:
    """A concept to forget.

    Attributes:
        phrasings: the ways a prompt may name it, such as ("seven", "7").
        surrogate: a prompt, a folder of images, or "noise".
        siblings: words for what could stand in its place in a prompt, such as the other digits; may be empty. A prompt
            that names neither the concept nor a sibling leaves the choice to the model.
    """

    phrasings: tuple[str, ...]
    surrogate: str
    siblings: tuple[str, ...] = ()

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
    return Concept(phrasings, surrogate, tuple(word for word in others if not mentions(word, phrasings)))


def is_folder(text: str) -> bool:
    """Whether a surrogate is a folder; a prompt may be longer than any file name, which is an error to ask about."""
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def looks_like_path(text: str) -> bool:
    """Whether somebody who wrote this meant a path: "./pictures", "/data/pictures", "~/pictures", "data/pictures"."""
    return text.startswith((".", "/", "~")) or ("/" in text and " " not in text)


def mentions(prompt: str, words: Sequence[str]) -> bool:
    """Whether a prompt contains one of the words or phrases, as whole words, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) for word in words)


def substitute(prompt: str, words: Sequence[str], replacement: str) -> str:
    """Put `replacement` in the place of each of the words or phrases in a prompt."""
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(re.escape(word) for word in longest_first)
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda _: replacement, prompt, flags=re.IGNORECASE)


def read_prompts(source: str, column: str = "prompt") -> list[str]:
    """Prompts from a text file (one a line, # starts a comment) or from a column of a data set.

    Args:
        source: a .txt file; a .json, .jsonl, .csv or .parquet file; a folder of such; or a hub id.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: the data set has no such column, or there is no prompt at all.
    """
    path = Path(resolve(source))
    if path.is_file() and path.suffix == ".txt":
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    elif path.suffix == ".txt":
        raise FileNotFoundError(f"no file {path}; expected prompts, one a line")
    else:
        data = _load_prompt_data(path, source)
        if column not in data.column_names:
            raise ValueError(f"{source} has columns {data.column_names}, none is {column!r}; pass --prompt_column")
        prompts = [text for text in data[column] if text]
    if not prompts:
        raise ValueError(f"no prompt in {source}")
    return prompts


def _load_prompt_data(path: Path, source: str):
    from datasets import load_dataset

    builder = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if builder is None:
        return load_dataset(str(path) if path.exists() else source, split="train")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a data set with a column of prompts")
    return load_dataset(builder, data_files=str(path), split="train")


def concept_templates(concept: Concept, prompts: Sequence[str], fallback: str, minimum: int = 16) -> list[str]:
    """Templates with {} in the concept's place: the prompts that name it, or those of a file if these are too few.

    Captions of the concept must span the ways it is asked for, or it is forgotten in a few sentences only.
    """
    naming = [prompt for prompt in prompts if mentions(prompt, concept.phrasings)]
    if len(naming) >= minimum:
        return [substitute(prompt.replace("{", "").replace("}", ""), concept.phrasings, "{}") for prompt in naming]
    templates = read_prompts(fallback)
    wrong = [template for template in templates if "{}" not in template]
    if wrong:
        raise ValueError(
            f"each template of {fallback} must hold {{}} where the concept goes; this one does not: {wrong[0]}"
        )
    return templates
