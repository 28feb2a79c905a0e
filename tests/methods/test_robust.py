"""Robust training in runs: what it needs and leaves, that accumulation makes no difference, and refusals."""

import json

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers.data.sample_set import SampleSet


ROBUST = {
    "robust_weight": 2.0, "robust_every": 2, "robust_steps": 2, "robust_samples": 4, "robust_groups": 2,
    "replay_negative": "mixture", "train_batch_size": 8, "num_surrogate_samples": 12, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(run_cheaply, tmp_path_factory):
    return run_cheaply(tmp_path_factory.mktemp("robust") / "run", **ROBUST)


def weights(outcome) -> dict[str, torch.Tensor]:
    return dict(outcome.pipeline.unet.state_dict())


def test_a_robust_run_leaves_its_pictures_and_both_terms(whole):
    history = json.loads((whole.output_dir / "history.json").read_text())
    assert ["adversary_loss" in row for row in history] == [True, False, True, False]
    assert all(row["open_loss"] > 0 for row in history)
    own = SampleSet.load(whole.output_dir / "surrogate" / "concept_samples.safetensors")
    assert len(own) == 3 and all("seven" in c.text or "7" in c.text for c in own.conditions)
    assert not (whole.output_dir / "samples" / "without_concept.safetensors").exists()


def test_accumulation_makes_no_difference(whole, run_cheaply, tmp_path):
    parts = run_cheaply(tmp_path / "run", **ROBUST, gradient_accumulation_steps=2)
    assert_close(weights(parts), weights(whole), rtol=1e-4, atol=2e-6)
