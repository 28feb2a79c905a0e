"""Distances between prompts in a model's own predictions."""

import torch
from torch.testing import assert_close

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
