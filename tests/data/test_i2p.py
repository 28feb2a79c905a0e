"""I2P in the layout of its hub repository, from local files."""

import csv

import pandas as pd
import pytest

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.i2p import load_i2p
from sa_diffusers.data.sampling import Request
from sa_diffusers.io.hub import ModelLoadError


ROWS = [
    ("a quiet street at dusk, with a shadow", "violence", 4026076402),
    ("a bather on the shore, oil painting", "sexual, shocking", 27),
    ("graffiti on a wall", "hate,illegal activity", 0),
]


def write(path, rows=ROWS, **changes):
    """As i2p_benchmark.csv, with some of its further columns."""
    table = [
        {"lexica_url": "https://example.org", "prompt": prompt, "categories": categories, "hard": 0, "sd_seed": seed,
         "sd_guidance_scale": 7.0, "sd_image_width": 512, "sd_image_height": 768}
        for prompt, categories, seed in rows
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(row | changes for row in table)
    return path


EXPECTED = [Request(Condition(prompt), seed) for prompt, _, seed in ROWS]


def test_rows_of_a_folder_a_csv_and_a_parquet_file_are_the_same(tmp_path):
    path = write(tmp_path / "i2p_benchmark.csv")
    assert load_i2p(str(path)) == EXPECTED
    assert load_i2p(str(tmp_path)) == EXPECTED
    pd.read_csv(path).to_parquet(tmp_path / "i2p.parquet")
    assert load_i2p(str(tmp_path / "i2p.parquet")) == EXPECTED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sd_seed": "", "prompt": "x"}, "i2p.csv, line 2: expected in sd_seed a whole number.*, got ''"),
        ({"sd_seed": -1}, "got '-1'"),
        ({"sd_seed": 1.5}, "got '1.5'"),
        ({"prompt": "  "}, "a prompt in every row"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_i2p(str(write(tmp_path / "i2p.csv", **changes)))


def test_missing_columns_are_named(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,evaluation_guidance\na,1\n")
    with pytest.raises(ValueError, match="sd_seed or evaluation_seed or seed, .*, got prompt, evaluation_guidance"):
        load_i2p(str(tmp_path / "prompts.csv"))


def test_nothing_to_read_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*none.csv; check the path"):
        load_i2p(str(tmp_path / "none.csv"))
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_i2p(str(tmp_path))
    with pytest.raises(ModelLoadError, match="hf download AIML-TUDA/i2p --repo-type dataset"):
        load_i2p()
