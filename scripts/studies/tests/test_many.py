"""The study of many concepts: its rows, how a row is made and kept, and the tables."""

import json

import pytest

from studies.many import CHAINS, DIGITS, ManyConfig, Study, run_study, tables


def judgement(worst: float, **said) -> dict:
    seen = {"seven": worst, "eight": 0.01}
    numbers = {"kept": 0.9, "kept worst": 0.8, "open": 0.1, "H_o": 0.94, "seconds": 30.0}
    return {"seen": seen, "unseen": seen, "attributes": {"ink": 0.5}} | numbers | said


def test_every_row_is_another_and_its_options_are_known():
    study = Study(ManyConfig(), 0)
    names = [name for name, _ in study.rows()]
    assert len(set(names)) == len(names) and "composed" in names
    runs = [study.options([DIGITS["seven"]], changes) for changes in CHAINS.values()]
    assert len({str(vars(config)) for config in runs}) == len(CHAINS)
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
    assert "| seven, 7 | 2 | 0.250 (seven) | 0.250 (seven) | 0.900 | 0.800 | 0.50 | 0.100 | 0.940 | 30 |" in text
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
