"""The robust study: its table and bars, and a small one from end to end, which goes on where it stopped."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.bundled import resolve
from studies.rivals.spec import Row, read_spec
from studies.robust import RobustStudy, bars, make_study, markdown, table


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


@pytest.mark.slow
def test_a_small_study_from_end_to_end(tmp_path):
    spec = read_spec(Path("configs/paper/digits/seven.yaml"))
    edit = {"method": "uce", "lora_rank": None}
    rows = {name: Row(name, edit, ("uce_erase_scale", [scale])) for name, scale in (("sa-edit", 0.03), ("uce", 1.0))}
    attacks = {"one vector": {"steps": 2}, "merged with half of the original": {"attack": "merged"}}
    classifier = load_classifier(resolve("bundled/digits/classifier")).eval()
    never = f"{resolve('bundled/digits')}/pipeline"  # stands in for one
    study = RobustStudy([replace(spec, rows=rows)], tmp_path, classifier, [0], never, 2, 0.03, attacks)
    text = make_study(study)
    found = json.loads((tmp_path / "robust.json").read_text())["concepts"]["seven"]
    assert list(found) == ["original", "never", "sa-edit", "uce"]
    one = {row: numbers[0] for row, numbers in found.items()}
    assert one["original"]["asked by name"] > 0.9 and one["sa-edit"]["asked by name"] < 0.1
    assert one["never"]["change"] == 0 < one["sa-edit"]["change"]
    assert [len(numbers["one vector"]) for numbers in one.values()] == [1, 1, 2, 2]
    assert [row for row, numbers in one.items() if "one vector of sa-edit" in numbers] == ["uce"]
    assert "merged with half of the original" not in one["never"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert make_study(study) == text
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
