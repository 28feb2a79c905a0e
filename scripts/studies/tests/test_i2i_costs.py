"""Models that complete pictures have their real sizes, and what is said of their runs is of the paper's settings."""

import json
from pathlib import Path

import pytest
import yaml

from sa_diffusers.families import family_class
from studies.costs.completion import CONFIGS, MODELS, estimate_completion
from studies.costs.memory import on_meta


RESULTS = Path(__file__).parents[3] / "docs" / "results" / "cost_i2i.json"
WEIGHTS = {"i2i_mae": 111_907_840, "i2i_sd": 859_535_364}  # of the released ones


def test_every_configuration_is_counted_by_its_own_settings():
    rows = {row["model"]: row for row in json.loads(RESULTS.read_text())}
    assert set(rows) == set(MODELS) == {path.stem for path in CONFIGS.glob("i2i_*.yaml")}
    for name, (build, pipeline) in MODELS.items():
        parameters = dict(on_meta(build).named_parameters())
        count = sum(parameter.numel() for parameter in parameters.values())
        assert rows[name]["weights"] == f"{count:,}" and count == WEIGHTS.get(name, count)
        encoder = family_class(pipeline).scopes["encoder"]
        share = sum(parameter.numel() for key, parameter in parameters.items() if encoder(key)) / count
        # positions that are constants count as weights of the file, and are never trained
        assert 0.3 < share < 0.8 and rows[name]["encoder"] == f"{share:.0%}"
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        assert rows[name]["steps x pictures"] == f"{config['num_train_steps']:,} x 2 x {config['train_batch_size']}"


@pytest.mark.slow
def test_the_table_is_what_is_counted():
    assert estimate_completion()[0] == json.loads(RESULTS.read_text())
