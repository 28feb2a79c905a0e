"""The study of many concepts: its rows, how a row is made and kept, and the tables."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

from sa_diffusers import methods
from sa_diffusers.core.fisher_file import Fisher
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import Marker
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.methods import base
from studies.many import ManyConfig, Study, copy_drawn, run_study, unit_fisher
from studies.many_bars import verdicts
from studies.many_cost import stage_seconds
from studies.many_figure import draw_curves
from studies.many_rows import AT_ONCE, CHAINS, CORE, DIGITS, REPEATED
from studies.many_tables import tables
from studies.projection import PROJECTED, projections_of


@pytest.fixture(autouse=True)
def projected(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(methods.registry()))
    methods.register(PROJECTED)


def judgement(worst: float, **said) -> dict:
    seen = {"seven": worst, "eight": 0.01}
    numbers = {"kept": 0.9, "kept worst": 0.8, "open": 0.1, "H_o": 0.94, "seconds": 30.0}
    return {"seen": seen, "unseen": seen, "attributes": {"ink": 0.5}} | numbers | said


def test_every_row_is_another_and_its_options_are_known():
    study = Study(ManyConfig(), 0)
    names = [name for name, _ in study.rows()]
    assert len(set(names)) == len(names) and set(CORE) <= set(names)
    for kind in (CHAINS, AT_ONCE, REPEATED):
        runs = [study.options([DIGITS["seven"]], changes) for changes in kind.values()]
        assert len({str(vars(config)) for config in runs}) == len(kind)
    quick = Study(ManyConfig(quick=True), 0).options([DIGITS["seven"]], {"num_train_steps": 80})
    seven, eight = [DIGITS["seven"]], [DIGITS["eight"]]
    folders = [study.folder(seven, {}), study.folder(seven, {"num_train_steps": 80}), study.folder(eight, {})]
    assert len(set(folders)) == 3 and folders[0] == study.folder(
        seven, {"num_train_steps": 120, "fisher": "elsewhere"}
    )
    assert (quick.num_train_steps, quick.concept) == (4, "seven, 7")
    # Another recipe has another name; a new option, which is `later`, has not, or all runs of before would be lost.
    assert folders[0].name == "seven-a3f2a34e8e1b6032"


def test_tables_name_the_worst_concept_of_the_means():
    runs = {
        str(seed): [judgement(0.2 + seed / 10, request="seven, 7"), judgement(0.4, request="eight, 8")]
        for seed in (0, 1)
    }
    text = tables({"in turn: plain": runs, "composed": {"0": [judgement(0.3, adapters="seven eight")]}})
    assert "| in turn: plain | 2 | 0.400 (seven) |" in text
    assert "| seven, 7 | 2 | 0.250 (seven) | 0.250 (seven) | 0.900 | 0.800 | 0.50 | 0.100 | 0.940 |  | 30 |" in text
    assert "| seven eight | 1 | 0.300 (seven) |" in text


def row(*judged: dict) -> dict:
    return {"0": list(judged)}


def test_bars_are_held_against_the_edits_the_original_and_one_concept():
    stages = {"samples": 100.0, "surrogate": 10.0, "train": 20.0}
    found = {
        "at once, 1: recipe": row(judgement(0.0, stages=stages)),
        "at once, 6: original": row(judgement(0.9, open=0.5)),
        "at once, 6: recipe": row(
            judgement(0.019, stages=stages | {"train": 60.0}, attacks={"seven": 0.2, "six": 0.4})
        ),
        "at once, 6: mixture": row(judgement(0.021, kept=0.986, open=0.2, H_o=0.9549, attacks={"seven": 0.1})),
        "at once, 6: uce": row(judgement(0.5, H_o=0.96, attacks={"seven": 0.3})),
        "at once, 6: speed": row(judgement(0.5, H_o=0.2)),
    }
    lines = verdicts(found).splitlines()
    assert len(lines) == 5 and "| at once, 1: recipe | 0.010 | 0.900 missed | – | – | – | 1.000 |" in lines
    # Seconds of what every run shares do not count: 70 of 30. Of the searched-for concepts the worst counts.
    assert (
        "| at once, 6: recipe | 0.019 | 0.900 missed | -0.020 missed | 0.200 | 0.100 missed | 2.333 missed |" in lines
    )
    assert "| at once, 6: mixture | 0.021 missed | 0.986 | -0.005 missed | 0.400 missed | -0.200 | – |" in lines


def test_a_request_in_turn_costs_all_that_it_makes_and_what_serves_all_is_named_where_it_is_made_anew():
    first = judgement(0.0, kept=1.0, request="seven, 7", stages={"samples": 20.0, "fisher": 10.0, "train": 5.0})
    then = {"kept": 0.99, "request": "eight, 8"}
    found = {
        "in turn: recipe anew": row(first, judgement(0.03, **then, stages={"fisher": 30.0, "train": 6.0})),
        "in turn: fisher first": row(first, judgement(0.01, **then, stages={"replay_samples": 1.0, "train": 6.0})),
        "in turn: plain": row(judgement(0.03, kept=1.0, request="x"), judgement(0.01, **then)),
    }
    lines = verdicts(found).splitlines()
    assert "| in turn: recipe anew | 0.990 | 0.030 missed | 0.030 missed | – | 1.029 missed | fisher |" in lines
    assert "| in turn: fisher first | 0.990 | 0.010 | 0.010 | – | 0.200 | nothing |" in lines
    assert "| in turn: plain | 0.990 | 0.030 missed | 0.010 | – | – | – |" in lines


def test_the_rest_is_compared_with_each_adapter_alone_on_what_both_keep():
    def alone(name: str, **rest: float) -> dict:
        return judgement(0.0, adapters=name, rest={"zero": 1.0, "two": 1.0} | rest)

    pair = judgement(0.0, adapters="seven eight", rest={"zero": 1.0, "two": 0.96})
    found = {"composed, in full": row(alone("seven", eight=0.2, two=0.97), alone("eight", seven=0.1), pair)}
    assert "| seven eight | 0.010 (eight) | 0.020 missed (most: two 0.040) |" in verdicts(found)


def test_a_row_without_a_later_measure_is_made_again_for_that_alone(tmp_path, monkeypatch):
    study = Study(ManyConfig(output_dir=str(tmp_path), attacks=1), 0)
    monkeypatch.setattr(Study, "run", lambda self, requests, *_: (tmp_path / requests[-1].concept, 3.0))
    monkeypatch.setattr("studies.many.stage_seconds", lambda folder, first=False: {"train": 2.0, "first": first})
    monkeypatch.setattr(
        "studies.many.attacked", lambda pipeline, one, *_: {"seven, 7": 0.7, "eight, 8": 0.8}[one.concept]
    )
    requests, known = [DIGITS["seven"], DIGITS["eight"]], [judgement(0.02, attacked=0.5)]
    made = study.at_once(requests, {}, known)
    assert made == [known[0] | {"stages": {"train": 2.0, "first": False}, "attacks": {"seven": 0.7}}]
    assert study.at_once(requests, {}, made) is made
    study.config.attacks = 7
    (both,) = study.at_once(requests, {}, made)
    assert both["attacks"] == {"seven": 0.7, "eight": 0.8} and "stages" not in known[0]

    known = [judgement(0.1, request="seven, 7"), judgement(0.2, request="eight, 8")]
    made = study.in_turn(("seven", "eight"), {}, True, known)
    assert [one.pop("stages")["first"] for one in made] == [True, False] and made == known


def test_the_first_of_a_chain_pays_for_what_it_was_given(tmp_path):
    def run(name: str, stages: dict[str, float], options: dict, reused: list[str]) -> Path:
        for stage, seconds in stages.items():
            Marker(tmp_path / name, stage, {}).finish(seconds)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(options))
        (tmp_path / name / "metrics.json").write_text(json.dumps({"seconds": {"reused": reused}}))
        return tmp_path / name

    made = {"samples": 20.0, "fisher": 10.0, "train": 5.0, "before": 3.0, "after": 3.0, "run": 0.0}
    shared = run("shared", made, {}, [])
    given = {"samples": str(shared / "samples"), "fisher": str(shared / "fisher.safetensors")}
    both = run("both", {"train": 4.0}, given, ["samples", "fisher"])
    none = run("none", {"train": 4.0}, given, [])  # which needed neither
    assert stage_seconds(shared) == {"fisher": 10.0, "samples": 20.0, "train": 5.0}
    assert stage_seconds(both) == stage_seconds(none, first=True) == {"train": 4.0}
    assert stage_seconds(both, first=True) == {"train": 4.0, "samples": 20.0, "fisher": 10.0}


def test_the_picture_has_a_line_of_panels_an_order(tmp_path):
    runs = row(judgement(0.1, request="seven, 7"), judgement(0.2, request="eight, 8"))
    assert draw_curves({"at once, 1: uce": runs}, tmp_path / "study.png") is None
    heights = []
    for names in (["in turn: plain"], ["in turn: plain", "in turn, other order: uce repeated"]):
        draw_curves(dict.fromkeys(names, runs), tmp_path / "study.png")
        heights.append(Image.open(tmp_path / "study.png").height)
    assert heights[1] > 1.5 * heights[0]


def test_what_was_made_is_kept_and_other_settings_are_refused(tmp_path):
    config = {"output_dir": str(tmp_path), "rows": ["at once, 1: original"]}
    kept = {"at once, 1: original": {"0": [judgement(0.9)]}}
    settings = {"images": 1.0, "requests": 6, "quick": False}
    (tmp_path / "study.json").write_text(json.dumps({"settings": settings, "rows": kept}))
    assert run_study(ManyConfig(**config)) == kept
    with pytest.raises(ValueError, match="was made with .*'quick': False}, got .*'quick': True}"):
        run_study(ManyConfig(**config, quick=True))
    with pytest.raises(ValueError, match="expected rows of at once, 1: original; .*got"):
        run_study(ManyConfig(output_dir=str(tmp_path), rows=["nothing"]))


def test_what_was_drawn_is_taken_with_its_marks(tmp_path):
    source, target = tmp_path / "one", tmp_path / "two"
    for name in (
        ".stages/run.json",
        ".stages/surrogate.json",
        ".stages/train.json",
        "surrogate/surrogate.safetensors",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_drawn(source, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {".stages/run.json", ".stages/surrogate.json", "surrogate/surrogate.safetensors"}
    (target / ".stages" / "surrogate.json").write_text("its own")
    copy_drawn(source, target)
    assert (target / ".stages" / "surrogate.json").read_text() == "its own"


def test_a_unit_fisher_has_the_sum_of_another(tmp_path):
    fisher = Fisher({"a": torch.rand(2, 3), "b": torch.rand(4)}, {"model_hash": "x"})
    fisher.save(tmp_path / "fisher.safetensors")
    unit = Fisher.load(unit_fisher(tmp_path / "fisher.safetensors"))
    values = torch.cat([tensor.flatten() for tensor in unit.tensors.values()])
    total = sum(tensor.sum() for tensor in fisher.tensors.values())
    assert_close(values, (total / 10).expand(10))
    assert unit.metadata == fisher.metadata


def test_what_retained_prompts_say_is_projected_away():
    family = get_family(load_pipeline(str(resolve("bundled/digits/pipeline")), None, None, "float32"))
    prompts = ["a red three", "a blue five", "two"]
    (projection,) = projections_of(family, prompts).values()
    assert_close(projection @ projection, projection, rtol=0, atol=1e-5)
    rows = torch.cat([family.text_parts(family.embed([prompt]))["tokens"][0] for prompt in prompts]).double()
    left = rows @ projection.double()
    assert 0 < torch.linalg.matrix_rank(projection) < len(projection)
    # Along each direction that is left the rows' mean square is below the threshold.
    assert torch.linalg.eigvalsh(left.T @ left / len(rows)).max() < 0.1
    assert left.square().sum() < 0.2 * rows.square().sum()


def test_adapters_stay_projected_through_steps_that_leave_the_gradients_space():
    down, projection = torch.nn.Parameter(torch.randn(2, 4)), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2
    projection = torch.block_diag(projection, torch.eye(2))
    method = copy.copy(PROJECTED)
    method.hold([(down, projection)])
    optimizer = torch.optim.Adam([down], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (down @ torch.arange(4.0)).square().sum().backward()
        optimizer.step()
        assert_close(down @ projection, down)
    method.hook.remove()
    assert down.abs().sum() > 0
