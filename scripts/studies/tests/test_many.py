"""The study of many concepts: its rows, how a row is made and kept, and the tables."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers import methods
from sa_diffusers.core.fisher_file import Fisher
from sa_diffusers.families import get_family
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.methods import base
from studies.many import ManyConfig, Study, copy_drawn, run_study, unit_fisher
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


def test_tables_name_the_worst_concept_of_the_means():
    runs = {
        str(seed): [judgement(0.2 + seed / 10, request="seven, 7"), judgement(0.4, request="eight, 8")]
        for seed in (0, 1)
    }
    text = tables({"in turn: plain": runs, "composed": {"0": [judgement(0.3, adapters="seven eight")]}})
    assert "| in turn: plain | 2 | 0.400 (seven) |" in text
    assert "| seven, 7 | 2 | 0.250 (seven) | 0.250 (seven) | 0.900 | 0.800 | 0.50 | 0.100 | 0.940 |  | 30 |" in text
    assert "| seven eight | 1 | 0.300 (seven) |" in text


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
