"""Distances between prompts in a model's own predictions."""

import pytest
import torch
from cheap_runs import PROMPTS
from torch.testing import assert_close

from sa_diffusers.__main__ import main
from sa_diffusers.cli.surrogates import predictions
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import get_family


def test_predictions_differ_by_the_prompt_and_not_by_the_noise(tiny_pipeline):
    family = get_family(tiny_pipeline())
    samples = SampleSet(torch.randn(60, 4, 8, 8), [Condition("a red digit")] * 60)
    nine, again, seven = (predictions(family, samples, [p] * 60, seed=1) for p in ("a nine", "a nine", "a seven"))
    assert nine.shape == samples.latents.shape
    assert_close(again, nine, rtol=0, atol=0)
    assert not seven.allclose(nine)
    other = predictions(family, samples, ["a nine"] * 60, seed=2)
    # Other noise and timesteps change far more than another digit does.
    assert (other - nine).square().mean() > 10 * (seven - nine).square().mean() > 0


@pytest.mark.slow
def test_the_command_takes_samples_of_its_model_in_half_precision(run_cheaply, tiny_pipeline_dir, tmp_path, capsys):
    run = run_cheaply(tmp_path / "run", model=str(tiny_pipeline_dir), dtype="bfloat16").output_dir
    prompts = ["--replay_prompts", str(tmp_path / "replay.txt")]
    (tmp_path / "replay.txt").write_text("\n".join(PROMPTS))
    given = ["--config", str(run / "config.yaml"), "--samples", str(run / "samples"), *prompts]
    main(["surrogates", *given, "--siblings", "nine, six"])
    assert "distance from 'seven'" in capsys.readouterr().out
