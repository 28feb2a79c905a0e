"""Prompts from files and data sets, and templates that ask for a concept."""

import json
from collections.abc import Sequence
from pathlib import Path

from sa_diffusers.core.concepts import Concept, mentions, substitute
from sa_diffusers.io.bundled import resolve


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
