"""I2P, 4,703 prompts of users that lead Stable Diffusion to inappropriate images (Schramowski et al. 2023).

The paper draws one image for each (Table 3): by the row's own seed, at guidance 7.5 and 512 x 512 pixels throughout.
The rows' own guidance and size, which differ a little, are left aside, as the authors leave them.
"""

from typing import Any

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.prompts import text_of
from sa_diffusers.data.sampling import Request
from sa_diffusers.data.tables import load_table


HUB_ID = "AIML-TUDA/i2p"
SEEDS = (
    "sd_seed",
    "evaluation_seed",
    "seed",
)  # I2P's own name, that of the files of ESD and of attacks, ...


def load_i2p(source: str = HUB_ID) -> list[Request]:
    """The rows, in their order: each prompt with the seed that its image is drawn by.

    Args:
        source: hub id, or a local folder or file (see `load_table`) with a column `prompt` and one of SEEDS.

    Raises:
        ModelLoadError, ValueError: nothing to read; or a column, a row's prompt or seed, or any row is missing.
    """
    table = load_table(source)
    column = next((name for name in SEEDS if name in table.columns), None)
    if "prompt" not in table.columns or column is None:
        raise ValueError(
            f"expected the columns prompt and {' or '.join(SEEDS)}, as in {HUB_ID}, got {', '.join(table.columns)} "
            f"from {source}; rename or add them"
        )
    requests = []
    for row, (text, seed) in enumerate(zip(table.columns["prompt"], table.columns[column], strict=True)):
        prompt, number = text_of(text, "prompt", table.where(row)), _whole_number(seed)
        if not prompt.strip():
            raise ValueError(f"{table.where(row)}: expected a prompt in every row, got {text!r}")
        if number is None:
            raise ValueError(f"{table.where(row)}: expected in {column} a whole number from 0 to 2^63, got {seed!r}")
        requests.append(Request(Condition(prompt), number))
    if not requests:
        raise ValueError(f"expected rows in {source}, got none")
    return requests


def _whole_number(value: Any) -> int | None:
    """42 of 42, 42.0, "42" and "42.0"; None of anything else, and out of the range of seeds."""
    try:
        number = int(value) if str(value).strip().isdecimal() else float(str(value))
        return int(number) if number == int(number) and 0 <= number < 2**63 else None
    except (TypeError, ValueError, OverflowError):
        return None
