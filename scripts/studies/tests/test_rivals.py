"""The table of methods: strengths, equal erasure, who keeps more, and a small table from end to end."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.artifacts import Marker
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.runs.options import ForgetConfig
from scripts import paper_table
from studies.rivals.judging import Counts, Judge
from studies.rivals.matching import COMPARABLE, Kept, Measured, Pooled, compare, curve, matched
from studies.rivals.runs import Point, reference_of, stage_seconds
from studies.rivals.spec import only_rows, read_spec
from studies.rivals.table import MethodTable, check_extra


CONCEPTS = ["digits/seven", "digits/red", "digits/bold"]
FLOW = ["digits_flow/seven", "digits_flow/red"]
CLASSES = torch.tensor([0, 0, 1, 1, 1, 2])
GROUPS = {name: [(0, f"{name} {i}") for i in range(6)] for name in ("concept", "unnamed", "long", "retained")}
KEPT = Kept(CLASSES, CLASSES == 1, GROUPS | {"unseen": [(0, "u"), (0, "v")]})


def measured(
    unseen: float, strength: int = 1, right=(1, 1, 1, 0, 1, 1), change: float = 0.1, kept: Kept = KEPT
) -> Measured:
    values = {
        "unseen": torch.tensor([unseen, unseen]),
        "retained": torch.tensor(right, dtype=torch.float32),
        "attributes": torch.tensor([1.0, torch.nan, 0.5, 1.0, 1.0, 1.0]),
        "change": torch.full((6,), change),
        "shown": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
    }
    return Measured(Point(strength, "nowhere", 10.0 * strength, 1.5), values, kept)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"samples": "there", "fisher": "there"}, 1 + 2 + 4 + 300 + 50),  # it drew its negatives itself
        ({}, 1 + 2 + 4 + 8),
        ({"method": "replay", "samples": "there"}, 1 + 2 + 4 + 300),
        ({"method": "finetune"}, 1 + 2),
    ],
)
def test_a_method_takes_the_seconds_of_all_it_needs(options, expected, tmp_path):
    for name, seconds in (("samples", 300), ("replay", 7), ("fisher", 50)):
        Marker(tmp_path, name, {}).finish(seconds)
    config = ForgetConfig(concept="seven", **options)
    assert stage_seconds(config, {"surrogate": 1, "train": 2, "sample": 4, "fisher": 8}, tmp_path) == expected


class TestSpec:
    @pytest.mark.parametrize("name", CONCEPTS + FLOW)
    def test_every_file_can_be_run(self, name):
        spec = read_spec(Path(f"configs/paper/{name}.yaml"))
        for row in spec.rows.values():
            runs = list(spec.configs(row, Path("out"), seed=3))
            assert len(runs) == (1 if row.trains else len(row.sweep[1]))
            assert len({config.output_dir for _, config in runs}) == len(runs)
            assert all(config.seed == 3 and not config.classifier for _, config in runs)

    @pytest.mark.parametrize("names", [CONCEPTS, FLOW])
    def test_files_hold_the_same_methods(self, names):
        first, *others = [list(read_spec(Path(f"configs/paper/{name}.yaml")).rows) for name in names]
        assert all(rows == first for rows in others)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rows": {}}, "at least one row"),
            ({"rows": {"a": {"method": "uce"}}}, "row a: expected the strengths of one option"),
            ({"rows": {"a": {"snapshot_steps": [1], "sweep": {"seed": [1]}}}}, "strengths of one option"),
            ({"rows": {"a": {"snapshot_steps": [5], "learning_rte": 1}}}, "learning_rte"),
            ({"long_templates": ["a digit"]}, "expected {} in every template"),
            ({"colour": "red"}, "unknown ones: .'colour'."),
            ({"neighbours": None}, "expected neighbours to be a list of texts, got None"),
            ({"rows": {"a": {"method": "uec", "snapshot_steps": [5]}}}, "row a: .*expected method to be one of"),
            ({"base": "none.yaml"}, "none.yaml cannot be read"),
        ],
    )
    def test_wrong_files_are_refused(self, changes, message, tmp_path):
        values = yaml.safe_load(Path("configs/paper/digits/seven.yaml").read_text()) | changes
        (tmp_path / "seven.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(ValueError, match=message):
            read_spec(tmp_path / "seven.yaml")

    def test_some_rows_are_ours_and_those_asked_for(self):
        spec = read_spec(Path("configs/paper/digits/seven.yaml"))
        assert list(only_rows(spec, ["uce"]).rows) == [spec.ours, "uce"]
        with pytest.raises(ValueError, match="seven has no row uec; it has sa-edit, sa-robust"):
            only_rows(spec, ["uec"])

    def test_the_row_that_drew_serves_all_wherever_it_stands(self, tmp_path):
        spec = read_spec(Path("configs/paper/digits/seven.yaml"))
        assert reference_of(spec, tmp_path) == tmp_path / spec.ours
        (tmp_path / "sa-lora" / "samples").mkdir(parents=True)
        assert reference_of(spec, tmp_path) == tmp_path / spec.ours
        (tmp_path / "sa-lora" / "samples" / "samples.json").touch()
        assert reference_of(spec, tmp_path) == tmp_path / "sa-lora"


class TestExtra:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"sven": {"never": "x"}}, "a further pipeline of seven, got one of 'sven'"),
            ({"seven": {"uce": "x"}}, "seven has a row 'uce' already"),
            ({"seven": {"original": "x"}}, "has a row 'original' already"),
            ({"seven": {"never": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ],
    )
    def test_wrong_further_pipelines_are_refused(self, extra, message, tmp_path):
        spec = read_spec(Path("configs/paper/digits/seven.yaml"))
        with pytest.raises((ValueError, ModelLoadError), match=message):
            check_extra(MethodTable([spec], tmp_path, None, Counts(), [0], extra))


class TestMatching:
    def test_the_gentlest_that_has_forgotten(self):
        sweep = [measured(0.4, 1, change=0.0), measured(0.04, 2, change=0.3), measured(0.001, 3, change=0.2)]
        assert matched(sweep).point.strength == 3
        assert matched(sweep[:2]).point.strength == 2
        assert matched([measured(0.2, 5), *sweep[:1]]).point.strength == 5  # none has: the one that forgot most

    def test_worst_class_and_neighbours_by_hand(self):
        pooled = Pooled([measured(0.01), measured(0.02, right=(1, 1, 0, 1, 1, 0))])
        summary = pooled.summary()
        assert summary["retained"]["mean"] == pytest.approx(9 / 12)
        assert summary["worst"] == {"mean": 0.75, "num_images": 4} | {
            "interval": summary["worst"]["interval"]
        }  # class 1
        assert summary["neighbours"]["mean"] == pytest.approx(4 / 6)
        assert summary["attributes"] == {"mean": pytest.approx(0.9), "num_images": 10} | {
            "interval": summary["attributes"]["interval"]
        }
        assert summary["reached"] and summary["seconds"] == 10 and summary["strength"] == [1, 1]
        low, high = summary["retained"]["interval"]
        assert low < 9 / 12 < high

    def test_what_chooses_shares_no_prompt_with_what_is_reported(self):
        """Neither a strength nor the worst class; pictures of one prompt are alike."""
        unseen = [(0, prompt) for prompt in "abbacc"]  # the first and the third prompt report
        retained = [(0, prompt) for prompt in "ppqqrrss"]
        classes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        kept = Kept(classes, classes == 1, GROUPS | {"unseen": unseen, "retained": retained})
        assert kept.chooses["unseen"].tolist() == [False, True, True, False, False, False]
        assert kept.chooses["retained"].tolist() == [False, False, True, True] * 2

        def one(strength: int, change: list[float], right: list[float]) -> Measured:
            part = measured(0.0, strength, kept=kept)
            part.values["unseen"] = torch.tensor([0.3, 0.01, 0.02, 0.4, 0.2, 0.1])
            part.values.update(change=torch.tensor(change), retained=torch.tensor(right))
            part.values["attributes"] = torch.ones(8)
            return part

        gentle = one(1, [0.9, 0.9, 0.1, 0.1] * 2, [0.0, 0, 1, 1, 1, 1, 0, 1])
        strong = one(2, [0.1, 0.1, 0.2, 0.2] * 2, [1.0] * 8)
        assert gentle.erased and matched([strong, gentle]) is gentle
        summary = Pooled([gentle]).summary()
        assert summary["unseen"]["mean"] == pytest.approx(0.25) == summary["unseen_by_seed"][0]
        assert summary["change"]["mean"] == pytest.approx(0.9) and summary["change"]["num_images"] == 4
        assert summary["worst"]["mean"] == 1 and summary["worst"]["num_images"] == 2  # class 1, by r
        assert compare(Pooled([gentle]), Pooled([strong]), ["change"])["change"]["difference"] == pytest.approx(0.8)
        with pytest.raises(ValueError, match="expected two prompts of unseen pictures or more"):
            Kept(CLASSES, CLASSES == 1, GROUPS | {"unseen": [(0, "u"), (0, "u")]})

    def test_pictures_of_a_prompt_are_alike_over_seeds(self):
        """Three seeds of the same prompts tell no more of other prompts than one, where a prompt decides."""

        def of_seed(seed: int) -> Measured:
            groups = {name: [(seed, prompt) for _, prompt in part] for name, part in KEPT.groups.items()}
            return measured(0.01, right=(1, 1, 1, 0, 1, 1), kept=Kept(CLASSES, CLASSES == 1, groups))

        one, three = (Pooled([of_seed(seed) for seed in seeds]).summary() for seeds in ([0], [0, 1, 2]))
        assert three["retained"]["num_images"] == 18
        assert three["retained"]["interval"] == pytest.approx(one["retained"]["interval"])
        gone = Pooled([measured(0.01, right=(0,) * 6, kept=of_seed(seed).kept) for seed in range(3)])
        pair = Pooled([of_seed(seed) for seed in range(3)])
        assert compare(gone, pair, ["retained"])["retained"]["better"] is False  # five prompts, not fifteen flips

    def test_who_keeps_more(self):
        ours = Pooled([measured(0.01, right=(1, 1, 0, 0, 0, 1), change=0.3)])
        other = Pooled([measured(0.01, right=(1, 1, 1, 1, 1, 1), change=0.1)])
        measures = list(COMPARABLE)
        better, worse = compare(ours, other, measures), compare(other, ours, measures)
        expected = {"retained": 0.5, "worst": 1.0, "neighbours": 1.0, "attributes": 0.0, "change": 0.2}
        for name in measures:
            assert better[name]["difference"] == pytest.approx(expected[name])
            low, high = better[name]["interval"]
            assert low - 1e-6 <= expected[name] <= high + 1e-6
        assert worse["change"]["difference"] == pytest.approx(-0.2) and not worse["change"]["better"]
        assert not better["attributes"]["better"]
        # Three pictures that flip, of six, cannot tell, and two of the worst class still less.
        assert not better["retained"]["better"] and not better["worst"]["better"]
        assert compare(ours, other, ["change"]).keys() == {"change"}

    def test_better_in_one_seed_only_is_not_better(self):
        prompts = {n: [(0, f"{p} {i}") for i in range(30) for _, p in groups] for n, groups in KEPT.groups.items()}
        many = [Kept(CLASSES.repeat(30), (CLASSES == 1).repeat(30), prompts)]
        many += [Kept(*(many[0].classes, many[0].neighbours), {n: [(1, p) for _, p in g] for n, g in prompts.items()})]

        def pooled(*changes: float) -> Pooled:
            parts = [measured(0.01, change=change, kept=kept) for change, kept in zip(changes, many, strict=True)]
            for part in parts:
                part.values.update({n: v.repeat(30) for n, v in part.values.items() if v.ndim == 1})
            return Pooled(parts)

        found = compare(pooled(0.5, 0.1), pooled(0.0, 0.11), ["change"])["change"]
        assert found["difference"] > 0 and found["interval"][0] > 0 and not found["better"]

    def test_a_curve_is_the_mean_over_seeds(self):
        sweeps = [[measured(0.4), measured(0.0)], [measured(0.2), measured(0.1)]]
        points = curve(sweeps, lambda part: part.point.strength)
        assert_close(torch.tensor(points), torch.tensor([(0.3, 1.0), (0.05, 1.0)]))


@pytest.fixture(scope="module")
def judge() -> Judge:
    classifier = load_classifier(resolve("bundled/digits/classifier")).eval()
    return Judge(read_spec(Path("configs/paper/digits/red.yaml")), classifier, Counts(2, 3, 2, 2, 10), seed=0)


class TestJudge:
    @pytest.mark.slow
    def test_the_original_has_not_changed_and_knows_the_concept(self, judge, tmp_path):
        model = resolve("bundled/digits/pipeline")
        values = judge.read(model, tmp_path / "original.safetensors", None)
        assert values["concept"].shape == (2,) and values["unseen"].shape == (3,) and values["retained"].shape == (10,)
        assert values["concept"].mean() > 0.8 and values["retained"].mean() > 0.8
        assert (values["change"] == 0).all()
        again = judge.read(model, tmp_path / "again.safetensors", values)  # drawn anew from the same seeds
        assert (again["change"] < 1e-6).all() and "retained_pictures" not in again
        written = (tmp_path / "again.safetensors").stat().st_mtime_ns
        judge.read(model, tmp_path / "again.safetensors", values)
        assert (tmp_path / "again.safetensors").stat().st_mtime_ns == written  # read from the file

    def test_a_neighbour_that_is_none_is_refused(self, tmp_path):
        values = yaml.safe_load(Path("configs/paper/digits/red.yaml").read_text()) | {"neighbours": ["orange"]}
        (tmp_path / "red.yaml").write_text(yaml.safe_dump(values))
        classifier = load_classifier(resolve("bundled/digits/classifier")).eval()
        with pytest.raises(ValueError, match="expected neighbours of red, yellow, .*, got 'orange'"):
            Judge(read_spec(tmp_path / "red.yaml"), classifier, Counts(), seed=0)


@pytest.mark.slow("minutes")
def test_a_small_table_from_end_to_end(tmp_path, monkeypatch, capsys):
    values = yaml.safe_load(Path("configs/paper/digits/seven.yaml").read_text())
    values["options"] |= {"num_samples": 60, "num_surrogate_samples": 60, "fisher_samples": 12}
    values["rows"] = {
        "sa-lora": {"snapshot_steps": [2, 4]},
        "sld": {"lora_rank": None, "sweep": {"method": ["sld-max"]}},
        "uce": {"method": "uce", "lora_rank": None, "sweep": {"uce_erase_scale": [1.0]}},
    }
    (tmp_path / "seven.yaml").write_text(yaml.safe_dump(values))
    flags = "--concepts seven --seeds 0 --images 0.15 --attack_steps 5 --num_threads 1".split()
    folders = ["--configs", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["paper_table.py", "digits", *flags, *folders])
    paper_table.main()
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "methods.json").read_text())["seven"]
    assert list(rows) == ["original", "sa-lora", "sld", "uce"]
    assert rows["original"]["concept"]["mean"] > 0.9 and rows["original"]["change"]["mean"] == 0
    assert rows["uce"]["unseen"]["mean"] < 0.3 < rows["uce"]["retained"]["mean"]
    assert rows["sld"]["megabytes"] == 0 < rows["sa-lora"]["megabytes"] < rows["uce"]["megabytes"] * 10
    assert [point["strength"] for point in rows["sa-lora"]["curve"][0]] == [2, 4]
    assert "### seven, 7 → three (local)" in first and "Methods with at most 0.05" in first
    assert (tmp_path / "out" / "seven_curves.png").stat().st_size > 10_000
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    paper_table.main()
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
