"""Prompts from files and data sets, and templates that ask for a concept."""

import json
from collections.abc import Sequence
from pathlib import Path

from sa_diffusers.core.concepts import Concept
from sa_diffusers.io.bundled import resolve


ENOUGH = 16  # prompts that name a concept: fewer do not span the ways it is asked for
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_prompts(source: str, column: str = "prompt") -> list[str]:
    """Prompts from a text file (one a line, # starts a comment) or from a column of a data set.

    Args:
        source: a .txt file; a .json, .jsonl, .csv or .parquet file; a folder of such; or a hub id.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: the data set has no such column, or there is no prompt at all.
    """
    path = Path(resolve(source))
    if path.suffix in (".txt", *_BUILDERS) and not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected prompts, one a line, or a data set with a column of them")
    if path.suffix == ".txt":
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    else:
        data = load_table(str(path) if path.exists() else source)
        if column not in data.column_names:
            raise ValueError(f"{source} has columns {data.column_names}, none is {column!r}; pass --prompt_column")
        prompts = [text for text in data[column] if text]
    if not prompts:
        raise ValueError(f"no prompt in {source}")
    return prompts


def load_table(source: str):
    """The rows of a .json, .jsonl, .csv or .parquet file, a folder of such, or a data set of the hub."""
    from datasets import load_dataset

    builder = _BUILDERS.get(Path(source).suffix)
    if builder is None:
        return load_dataset(source, split="train")
    return load_dataset(builder, data_files=source, split="train")


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
    for number, line in enumerate(Path(resolve(path)).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from error
        if not isinstance(row, dict) or "prompt" not in row or row.get("form") not in ("seen", "held_out"):
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": ..., "form": "seen" or "held_out", classes}}'
            )
        rows.append(row)
    return rows


def concept_templates(concept: Concept, prompts: Sequence[str], fallback: str) -> list[str]:
    """Templates with {} in the concept's place: the prompts that name it, or those of a file if these are too few.

    Captions of the concept must span the ways it is asked for, or it is forgotten in a few sentences only.
    """
    naming = [prompt for prompt in prompts if concept.named_in(prompt)]
    return [template_of(p, concept) for p in naming] if len(naming) >= ENOUGH else read_templates(fallback)


def template_of(prompt: str, concept: Concept) -> str:
    """A prompt that names the concept with {} in its place."""
    return concept.replaced_in(prompt.replace("{", "").replace("}", ""), "{}")
