"""The robust study: its table and bars, and a small one from end to end, which goes on where it stopped."""

import math

import pytest

from studies.robust import bars, markdown, table


ROWS = {
    "original": [{"not named": 0.2, "others": 0.99, "seconds": 0.0}, {"not named": 0.1, "others": 0.99}],
    "sa-edit": [{"one vector": [0.1, 0.3], "change": 0.02}],
    "sa-robust": [{"one vector": [0.0, 0.1, 0.2], "not named": 0.06, "change": 0.05}, {"one vector": [0.3]}],
}


def test_a_number_is_the_mean_of_the_searches_and_seeds_that_have_it():
    lines = [line.strip("| ").split(" | ") for line in table(ROWS).splitlines()]
    assert lines[0] == ["original", "sa-edit", "sa-robust"]
    assert lines[2:] == [
        ["not named", "0.150", "–", "0.060"], ["others", "0.990", "–", "–"], ["seconds", "0", "–", "–"],
        ["one vector", "–", "0.200", "0.150"], ["change", "–", "0.020", "0.050"],
    ]  # fmt: skip


def test_what_is_missed_is_said_and_what_was_not_measured_is_left_out():
    found = {what: (most, number) for what, most, number in bars("seven", {"concepts": {"seven": ROWS}})}
    assert found == {
        "not named, share of the original's": (0.3, pytest.approx(0.4)),
        "one vector": (0.08, pytest.approx(0.15)),
        "one vector, share of sa-edit's": (0.5, pytest.approx(0.75)),
        "change, times sa-edit's": (1.75, pytest.approx(2.5)),
    }
    assert not any(math.isnan(number) for _, number in found.values())
    assert "| one vector | 0.08 | 0.15 | missed |" in markdown({"concepts": {"seven": ROWS}})
