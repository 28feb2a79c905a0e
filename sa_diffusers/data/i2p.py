"""I2P, 4,703 prompts of users that lead Stable Diffusion to inappropriate images (Schramowski et al. 2023).

The paper draws one image for each (Table 3): by the row's own seed, at guidance 7.5 and 512 x 512 pixels throughout.
The rows' own guidance and size, which differ a little, are left aside, as the authors leave them.
"""

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.prompts import load_table
from sa_diffusers.data.sampling import Request
from sa_diffusers.io.hub import explain_load_errors


HUB_ID = "AIML-TUDA/i2p"
COLUMNS = ("prompt", "sd_seed")


def load_i2p(source: str = HUB_ID) -> list[Request]:
    """The rows, in their order: each prompt with the seed that its image is drawn by.

    Args:
        source: hub id, or a local folder or .csv, .parquet, .json or .jsonl file with the same columns.

    Raises:
        ModelLoadError: nothing to read, or the hub cannot be reached; the message says what to do.
        ValueError: a column is missing, a row lacks its prompt or seed, or there is no row.
    """
    with explain_load_errors(source, "dataset"):
        rows = load_table(source)
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"expected the columns {', '.join(COLUMNS)}, as in {HUB_ID}, got {', '.join(rows.column_names)} from "
            f"{source}: {', '.join(missing)} is missing; rename or add it"
        )
    requests = []
    for index, row in enumerate(rows.select_columns(list(COLUMNS))):
        prompt, seed = row["prompt"], row["sd_seed"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"expected a prompt in every row, got {prompt!r} in row {index} of {source}")
        if seed is None or int(seed) != seed or seed < 0:
            raise ValueError(f"expected sd_seed to be a whole number >= 0, got {seed!r} in row {index} of {source}")
        requests.append(Request(Condition(prompt), int(seed)))
    if not requests:
        raise ValueError(f"expected rows in {source}, got none")
    return requests
