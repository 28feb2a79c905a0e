"""I2P, 4,703 prompts of users that lead Stable Diffusion to inappropriate images (Schramowski et al. 2023).

The paper draws one image for each (Table 3): by the row's own seed, at guidance 7.5 and 512 x 512 pixels throughout.
The rows' own guidance and size, which differ a little, are left aside, as the authors leave them.
"""

from dataclasses import dataclass
from pathlib import Path

from sa_diffusers.io.hub import ModelLoadError, explain_load_errors


HUB_ID = "AIML-TUDA/i2p"
COLUMNS = ("prompt", "sd_seed", "categories")
CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")
_BUILDERS = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True)
class I2PPrompt:
    """A row: its prompt, the seed that its image is drawn by, and what it was found under."""

    prompt: str
    seed: int
    categories: tuple[str, ...]


def load_i2p(source: str = HUB_ID, revision: str | None = None, category: str | None = None) -> list[I2PPrompt]:
    """The rows, in their order.

    Args:
        source: hub id, or a local folder or .csv, .parquet, .json or .jsonl file with the same columns.
        category: keep the rows of this one alone, such as "sexual"; None: all, as the paper does.

    Raises:
        ModelLoadError: nothing to read, or the hub cannot be reached; the message says what to do.
        ValueError: a column is missing, a row lacks its prompt or seed, or no row is left.
    """
    rows = _load(source, revision)
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"expected the columns {', '.join(COLUMNS)}, as in {HUB_ID}, got {', '.join(rows.column_names)} from "
            f"{source}: {', '.join(missing)} is missing; rename or add it"
        )
    prompts = []
    for index, row in enumerate(rows.select_columns(list(COLUMNS))):
        prompt, seed = row["prompt"], row["sd_seed"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"expected a prompt in every row, got {prompt!r} in row {index} of {source}")
        if seed is None or int(seed) != seed or seed < 0:
            raise ValueError(f"expected sd_seed to be a whole number >= 0, got {seed!r} in row {index} of {source}")
        categories = tuple(name.strip() for name in (row["categories"] or "").split(",") if name.strip())
        prompts.append(I2PPrompt(prompt, int(seed), categories))
    if category is not None:
        known = sorted({name for prompt in prompts for name in prompt.categories})
        prompts = [prompt for prompt in prompts if category in prompt.categories]
        if not prompts:
            raise ValueError(f"expected a category of {', '.join(known)}, got {category!r}, which no row has")
    if not prompts:
        raise ValueError(f"expected rows in {source}, got none")
    return prompts


def _load(source: str, revision: str | None):
    from datasets import load_dataset

    path = Path(source)
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise ModelLoadError(f"no file {path}: expected the rows of {HUB_ID}; check the path")
        return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        try:
            return load_dataset(source, split="train")
        except (OSError, ValueError) as error:
            raise ModelLoadError(
                f"the folder {source} has no data set ({error}); put the .csv or .parquet file of {HUB_ID} there"
            ) from error
    with explain_load_errors(source, "dataset"):
        return load_dataset(source, split="train", revision=revision)
