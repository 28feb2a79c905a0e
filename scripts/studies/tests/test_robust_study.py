"""The robust study: its table and bars, and a small one from end to end, which goes on where it stopped."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sa_diffusers.attacks.plan import ON_OTHERS
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.bundled import resolve
from studies import robust
from studies.rivals.judging import Judge
from studies.rivals.spec import read_spec
from studies.robust import RobustStudy, attacked, back_after, bars, curve, make_study, markdown, table
from studies.robust_figure import draw_robustness


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
        ["change", "–", "0.020", "0.050"], ["one vector", "–", "0.200", "0.150"],
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


def test_relearning_is_told_by_the_steps_until_the_concept_is_as_likely_as_not():
    rows = {"sa-edit": [{"asked by name": 0.0, "relearned 25 steps": [0.2], "relearned 50 steps": [0.8]}]}
    assert curve(rows, "sa-edit") == {0: 0.0, 25: 0.2, 50: 0.8}
    assert back_after({0: 0.0, 25: 0.2, 50: 0.8}) == "38"  # half of the way from the one to the other
    assert back_after({0: 0.9, 25: 0.95}) == "0" and back_after({0: 0.0, 25: 0.2}) == "over 25"
    assert "| steps of relearning until it is back | 38 | – |" in table(rows | {"original": [{"others": 1.0}]})


def test_the_picture_has_a_pair_of_panels_a_concept_and_takes_rows_that_lack_measures(tmp_path):
    rows = ROWS | {"never": [{"asked by name": 0.1, "relearned 25 steps": [0.2]}]}
    widths = []
    for concepts in ({"seven": rows}, {"seven": rows, "red": {"original": [{}]}}):
        draw_robustness(concepts, tmp_path / "robust.png")
        widths.append(Image.open(tmp_path / "robust.png").width)
    assert widths[1] > 1.5 * widths[0]


def test_some_rows_are_of_the_first_seed_alone(tmp_path, monkeypatch):
    spec = read_spec(Path("configs/paper/digits/seven.yaml"))
    spec = replace(spec, rows={name: {} for name in ("sa-edit", "sa-robust", "sa-search")})
    monkeypatch.setattr(robust, "_measured", lambda study, spec, seed: ((row, {"change": 1.0}) for row in spec.rows))
    classifier = SimpleNamespace(config=SimpleNamespace(accuracy=None))
    make_study(RobustStudy([spec], tmp_path, classifier, [3, 4], once=["sa-search"]))
    rows = json.loads((tmp_path / "robust.json").read_text())["concepts"]["seven"]
    assert {name: len(seeds) for name, seeds in rows.items()} == {"sa-edit": 2, "sa-robust": 2, "sa-search": 1}


@pytest.mark.slow
def test_controls_are_attacked_once_and_what_one_row_finds_is_tried_on_the_next(tmp_path):
    spec = read_spec(Path("configs/paper/digits/seven.yaml"))
    spec = replace(spec, options=spec.options | {"num_inference_steps": 4})
    attacks = {"one vector": {"steps": 2, "num_targets": 4}, "merged": {"attack": "merged", "num_targets": 4}}
    relearn = {"attack": "relearn", "num_targets": 4, "relearn_pictures": 2}
    attacks["relearned"] = relearn | {"steps": 2, "relearn_every": 1}
    attacks[ON_OTHERS] = relearn | {"steps": 1}
    classifier, model = (
        load_classifier(resolve("bundled/digits/classifier")).eval(),
        resolve("bundled/digits/pipeline"),
    )
    study = RobustStudy([spec], tmp_path, classifier, [0], restarts=2, share=0.02, attacks=attacks)
    judge = Judge(spec, classifier, study.counts, seed=0)
    victims = dict.fromkeys(("original", "never", "sa-edit", "sa-robust"), model)  # as if none had forgotten

    def make() -> dict[str, dict]:
        found: dict[str, dict] = {row: {} for row in victims}
        for row, numbers in attacked(study, judge, tmp_path, victims):
            found[row] |= numbers
        return found

    found = make()
    assert all(numbers["asked by name"] > 0.9 for numbers in found.values())
    assert [len(numbers["one vector"]) for numbers in found.values()] == [1, 1, 2, 2]
    assert found["sa-robust"]["one vector of sa-edit"] == found["sa-edit"]["one vector"]
    assert [row for row, numbers in found.items() if "one vector of sa-edit" in numbers] == ["sa-robust"]
    assert [row for row, numbers in found.items() if "merged" in numbers] == ["original", "sa-edit", "sa-robust"]
    assert all(len(numbers[f"relearned {n} steps"]) == 1 for numbers in found.values() for n in (1, 2))
    assert all(len(numbers[f"{ON_OTHERS} 1 steps"]) == 1 for numbers in found.values())
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert make() == found
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
