"""Batches: nested tensors that share their first dimension."""

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers.core.batches import cat, conditions_of, repeat, take, to


BATCH = {"sample": torch.arange(6.0).view(3, 2), "added": {"time": torch.arange(3), "deeper": {"x": torch.ones(3, 1)}}}


def test_rows_are_taken_at_every_depth():
    for rows in (slice(1, None), [1, 2], torch.tensor([False, True, True])):
        assert_close(
            take(BATCH, rows),
            {
                "sample": BATCH["sample"][1:],
                "added": {"time": BATCH["added"]["time"][1:], "deeper": {"x": torch.ones(2, 1)}},
            },
        )


def test_parts_put_together_are_the_whole():
    assert_close(cat([take(BATCH, slice(0, 1)), take(BATCH, slice(1, None))]), BATCH)
    with pytest.raises(KeyError):
        cat([BATCH, {"sample": BATCH["sample"]}])


def test_a_row_is_repeated_without_a_copy():
    row = take(BATCH, slice(0, 1))
    many = repeat(row, 4)
    assert many["sample"].shape == (4, 2) and many["added"]["deeper"]["x"].shape == (4, 1)
    assert many["sample"].data_ptr() == row["sample"].data_ptr()


def test_to_moves_every_tensor_and_conditions_are_the_rest():
    assert {t.device.type for t in (to(BATCH, "meta")["sample"], to(BATCH, "meta")["added"]["time"])} == {"meta"}
    assert conditions_of(BATCH) == {"added": BATCH["added"]}
