"""What is counted of the large families is what their real sizes come to, and what a real step takes."""

import json
from pathlib import Path

import pytest
import torch

from sa_diffusers.core.batches import map_tensors
from sa_diffusers.families import get_family
from scripts import benchmark
from studies.costs import counting, large, whole_run
from studies.costs.architectures import DENOISERS
from studies.costs.memory import on_meta
from tests.tiny_text_to_image import make


RESULTS = Path(__file__).parents[3] / "docs" / "results"


@pytest.mark.parametrize(
    ("size", "count"), [("sdxl", 2_567_463_684), ("sd3", 2_028_328_000), ("flux", 11_901_408_320)]
)
def test_the_denoisers_have_the_weights_of_the_real_ones(size, count):
    assert sum(parameter.numel() for parameter in on_meta(DENOISERS[size]).parameters()) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xl", "sd3", "flux-dev"])
def test_bytes_on_meta_are_those_of_a_real_step(name, tiny_tokenizer):
    real, shadow = (get_family(make(name, tiny_tokenizer)).module for _ in range(2))
    inputs = map_tensors(counting.inputs_of(real, 4, 8), lambda t: torch.zeros_like(t, device="cpu"))
    with counting.TensorBytes() as counter:
        real.requires_grad_(True)(**inputs).sample.square().mean().backward()
    counted = counting.step_bytes(shadow.requires_grad_(True).to("meta"), 4, None, False, size=8)
    assert counted == pytest.approx(counter.peak, rel=0.3)  # attention keeps less on a GPU
    assert counting.step_bytes(shadow, 4, None, True, size=8) < counted
    assert counting.forward_bytes(shadow, 4, None, size=8) < counted


@pytest.mark.parametrize("size", DENOISERS)
def test_the_tables_say_what_a_card_must_hold(size):
    found = json.loads((RESULTS / f"cost_{size}.json").read_text())
    peaks = [row["peak"] for row in found["stages"]]
    assert found["needed"] == max(found["memory"][-1]["peak, Fisher in main memory"], *peaks)
    assert found["limit"] == large.LIMITS[size]


def test_what_is_not_counted_or_not_measured_is_refused(monkeypatch, capsys, tmp_path):
    for size, more, says in (("tiny", ["--estimate"], "--estimate counts large"), ("sd3", [], "pass --estimate")):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--size", size, *more, "--output_dir", str(tmp_path)])
        with pytest.raises(SystemExit):
            benchmark.main()
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run_tells_what_each_stage_held(tiny_tokenizer, tmp_path):
    pipeline = make("xl", tiny_tokenizer)
    pipeline.unet.register_to_config(sample_size=32 // pipeline.vae_scale_factor)  # what the classifier reads
    pipeline.save_pretrained(tmp_path / "model")
    report, text = whole_run.run_whole(tmp_path)
    stages = {row["stage"]: row for row in report["stages"]}
    assert {"samples", "surrogate", "fisher", "train", "before", "after"} <= stages.keys()
    # Counted of the real size: training holds what drawing does, and EWC's Fisher of the adapted layers.
    assert stages["train"]["counted"] > stages["samples"]["counted"] > 0 < stages["train"]["measured"]
    assert "| train " in text
