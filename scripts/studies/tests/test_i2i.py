"""The study of models that complete pictures: a row runs, is kept, and stands in the table."""

import json

import pytest

from studies.i2i.table import ROWS, I2IConfig, run_study, table


def test_every_row_changes_known_options_and_none_is_another():
    assert len({json.dumps(changes, sort_keys=True) for changes in ROWS.values()}) == len(ROWS)


def test_means_of_seeds_stand_in_the_table():
    def side(error: float) -> dict:
        groups = {name: {"masked_mse": error, "accuracy": 0.5} for name in ("forget", "third")}
        return groups | {"fresh_decoder": {"masked_mse": 0.4}}

    runs = {str(seed): {"before": side(0.2), "after": side(0.6 + seed / 10)} for seed in range(2)}
    text = table({"EWC alone": runs})
    assert "| EWC alone | 2 | 0.650 / 0.500 | – | 0.650 / 0.500 | 0.400 |" in text and "0.200 / 0.500" in text
    assert table({}) == ""


@pytest.mark.slow
def test_a_row_runs(tmp_path, monkeypatch):
    config = I2IConfig(output_dir=str(tmp_path), only="few pictures, no EWC", num_train_steps=1)
    monkeypatch.setitem(
        ROWS, "few pictures, no EWC", ROWS["few pictures, no EWC"] | {"num_train_steps": 1, "eval_images_class": 3}
    )
    found = run_study(config)
    assert json.loads((tmp_path / "study.json").read_text()) == found
    assert found["few pictures, no EWC"]["0"]["after"]["retain"]["num_images"] == 12
    assert "few pictures, no EWC | 1 |" in (tmp_path / "study.md").read_text()
