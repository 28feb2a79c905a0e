"""Prompts from files and data sets, and templates that ask for a concept."""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sa_diffusers.core.concepts import Concept
from sa_diffusers.data.tables import KINDS, check_kind, json_lines, kind_of, load_table
from sa_diffusers.io.atomic_files import read_text
from sa_diffusers.io.bundled import resolve


ENOUGH = 16  # prompts that name a concept: fewer do not span the ways it is asked for


def read_prompts(source: str, column: str = "prompt") -> list[str]:
    """Prompts from a text file (one a line, # starts a comment) or from a column of a data set.

    Args:
        source: a .txt file, or what `load_table` reads.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: a file that cannot be read, a data set without that column, or no prompt at all.
        ModelLoadError: as `load_table`.
    """
    path = Path(resolve(source))
    check_kind(path, ".txt", *KINDS)
    if kind_of(path) == ".txt":
        lines = read_text(path).split("\n")
        prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    else:
        table = load_table(str(path) if path.exists() else source)
        if column not in table.columns:
            raise ValueError(f"{source} has columns {list(table.columns)}, none is {column!r}; pass --prompt_column")
        found = (text_of(value, column, table.where(i)) for i, value in enumerate(table.columns[column]))
        prompts = [text for text in found if text.strip()]
    if not prompts:
        raise ValueError(f"no prompt in {source}")
    return prompts


def text_of(value: Any, column: str, where: str) -> str:
    """A value as text, "" for none; 7 is "7". Raises ValueError for what is neither text nor a whole number."""
    if value is None or isinstance(value, str):
        return value or ""
    if type(value) is int:
        return str(value)
    raise ValueError(f"{where}: expected text in the column {column!r}, got {reprlib.repr(value)}; write it in quotes")


def read_templates(path: str) -> list[str]:
    """The lines of a text file of prompts with {} in the concept's place. Raises ValueError for one without."""
    lines = read_prompts(path)
    wrong = [line for line in lines if "{}" not in line]
    if wrong:
        raise ValueError(f"each line of {path} must hold {{}} where the concept goes; this one does not: {wrong[0]!r}")
    return lines


def read_labelled_prompts(path: str) -> list[dict[str, str]]:
    """Rows {"prompt", "form": "seen" or "held_out", and a class for each attribute named}, a JSON object a line.

    Raises:
        ValueError: a line that is not of this form.
    """
    rows = []
    for row, number in json_lines(read_text(resolve(path)), Path(path)):
        known = isinstance(row, dict) and row.get("form") in ("seen", "held_out")
        if not known or not all(isinstance(value, str) for value in [row.get("prompt"), *row.values()]):
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": ..., "form": "seen" or "held_out", classes}}, in text'
            )
        rows.append(row)
    return rows


def concept_templates(concept: Concept, prompts: Sequence[str], fallback: list[str]) -> list[str]:
    """Templates with {} in the concept's place: the prompts that name it, or others where these are too few.

    Captions of the concept must span the ways it is asked for, or it is forgotten in a few sentences only.
    """
    naming = [prompt for prompt in prompts if concept.named_in(prompt)]
    return [template_of(p, concept) for p in naming] if len(naming) >= ENOUGH else fallback


def within_limit(templates: list[str], concept: Concept, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The templates in which a text encoder reads every phrasing of the concept to its end.

    Beyond its limit the concept is cut off: its caption would teach something of everything else.

    Raises:
        ValueError: none is left.
    """
    if tokenizer is None or tokenizer.model_max_length > 10**6:  # tokenizers without a limit say an enormous one
        return templates
    texts = [(t.partition("{}")[0] + phrasing, t) for t in templates for phrasing in concept.phrasings]
    read = tokenizer([text for text, _ in texts], verbose=False).input_ids
    cut = {t for (_, t), ids in zip(texts, read, strict=True) if len(ids) > tokenizer.model_max_length}
    if cut.issuperset(templates):
        raise ValueError(
            f"no template has {concept.name!r} within the {tokenizer.model_max_length} tokens that the text encoder "
            "reads; pass shorter --concept_templates, or a shorter concept"
        )
    return [template for template in templates if template not in cut]


def template_of(prompt: str, concept: Concept) -> str:
    """A prompt that names the concept with {} in its place."""
    return concept.replaced_in(prompt.replace("{", "").replace("}", ""), "{}")
