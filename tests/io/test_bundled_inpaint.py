"""The bundled masked autoencoder fills holes with the digit that was there, and forgets by its configuration."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sa_diffusers.cli.forget import main
from sa_diffusers.data.picture_groups import read_group
from sa_diffusers.evaluation.completion import completed, measured
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.families import get_family
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import load_pipeline


FOLDER = Path(resolve("bundled/digits_inpaint"))


def test_it_is_small_and_in_half_precision():
    files = [path for path in (FOLDER / "pipeline").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2e6
    weights = load_file(FOLDER / "pipeline" / "mae" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.slow
def test_what_it_fills_in_is_read_as_the_digit_that_was_there():
    group = read_group("bundled/digits_inpaint", "pictures", 32, (1, 12))
    assert (len(group.train), len(group.test)) == (10, 120)
    family = get_family(load_pipeline("bundled/digits_inpaint/pipeline", None, None, "float32"))
    classifier = load_classifier("bundled/digits_inpaint/classifier")
    values, _ = measured(*completed(family, group, "half", 0), group, classifier)
    assert values["masked_mse"] < 0.25 and values["accuracy"] > 0.85
    black, _ = measured(*completed(family, group, "half", 0)[:1] * 2, torch.ones(1, 1, 32, 32), group, classifier)
    assert black["accuracy"] > 0.95  # of the true pictures


@pytest.mark.slow
def test_its_configuration_forgets_and_holds_the_rest(tmp_path, capsys):
    main(["--config", "bundled/digits_inpaint", "--output_dir", str(tmp_path), "--eval_images_class", "50"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    change = {
        name: metrics["after"][name]["masked_mse"] / metrics["before"][name]["masked_mse"]
        for name in ("forget", "retain", "third")
    }
    assert change["forget"] > 1.8 and change["retain"] < 1.2 and change["third"] < 1.6
    assert metrics["after"]["forget"]["accuracy"] < metrics["before"]["forget"]["accuracy"] - 0.08
    assert metrics["after"]["retain"]["accuracy"] > metrics["before"]["retain"]["accuracy"] - 0.03
    assert "Not erased against a new decoder" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Forgetting 2, 5, 8</h1>" in page and "one picture under one hole" in page
