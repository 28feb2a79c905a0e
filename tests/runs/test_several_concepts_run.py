"""Runs that forget several concepts at once: what they draw, leave and say, by every way to name them."""

import json

import pytest
import torch

from sa_diffusers import Forget, forget
from sa_diffusers.core.concepts import mentions
from sa_diffusers.core.conditions import texts
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline


pytestmark = pytest.mark.usefixtures("few_pictures")
PAIRS = {"concept": "seven, 7; eight", "surrogate": "nine; six"}


@pytest.fixture(scope="module")
def outcome(run_cheaply, tmp_path_factory):
    return run_cheaply(tmp_path_factory.mktemp("several") / "run", **PAIRS, start="edit", uce_preserve_scale=0.1)


def test_all_are_asked_for_and_none_is_replayed(outcome):
    surrogate = texts(SampleSet.load(outcome.output_dir / "surrogate" / "surrogate.safetensors").conditions)
    assert [mentions(text, ["eight"]) for text in surrogate] == [False, True] * 2
    assert [mentions(text, ["seven", "7"]) for text in surrogate] == [True, False] * 2
    anew = texts(SampleSet.load(outcome.output_dir / "samples" / "without_concept.safetensors").conditions)
    assert anew and all(mentions(text, ["nine", "six", "three", "zero", "one", "two"]) for text in anew)


def test_each_stands_in_the_record_and_the_numbers(outcome):
    records = read_forgotten(str(outcome.output_dir / "pipeline"))
    assert [(r["concept"], r["surrogate"]) for r in records] == [("seven, 7", "nine"), ("eight", "six")]
    assert records[0]["after"] == records[1]["after"] != records[0]["before"] and records[0]["versions"]
    metrics = json.loads((outcome.output_dir / "metrics.json").read_text())
    assert (metrics["concept"], metrics["surrogate"]) == ("seven, 7; eight", "nine; six")
    by_concept = metrics["after"]["concept_preference_by_concept"]
    assert by_concept.keys() == {"seven", "eight"} and list(by_concept.values()) == sorted(by_concept.values())[::-1]
    card = (outcome.output_dir / "pipeline" / "README.md").read_text()
    assert "without “seven, 7; eight”" in card and "Preferred: eight" in card


def test_a_file_that_says_the_same_is_the_same_run(outcome, run_cheaply, tmp_path):
    (tmp_path / "list.csv").write_text('concept,surrogate\n"seven, 7",nine\neight,six\n')
    given = {"concept": "", "concepts": str(tmp_path / "list.csv"), "start": "edit", "uce_preserve_scale": 0.1}
    again = run_cheaply(outcome.output_dir, **given | {"surrogate": None})
    assert set(again.metrics["seconds"]["reused"]) >= {"edit", "samples", "surrogate", "fisher", "train", "after"}


@pytest.mark.parametrize("surrogate", ["noise", "2"])
def test_several_classes_are_shown_in_turn(surrogate, tmp_path):
    torch.manual_seed(0)
    pipeline = ConditionalVAEPipeline(ConditionalVAE(image_size=8, num_classes=3, hidden_sizes=(8,), latent_dim=2))
    pairs = [Forget("0", surrogate), Forget("1", surrogate)]
    few = {"num_train_steps": 2, "train_batch_size": 4, "fisher_samples": 4, "num_samples": 8, "lr_warmup_steps": 0}
    forgotten = forget(pipeline, pairs, output_dir=tmp_path, progress=False, checkpointing_steps=None, **few)
    assert [record["concept"] for record in forgotten.forgotten] == ["0", "1"]
    with pytest.raises(ValueError, match="a list of concepts says all of each; expected no surrogate"):
        forget(pipeline, pairs, "noise")
    with pytest.raises(ValueError, match="concept 1 .*is itself forgotten, by concept 2"):
        forget(pipeline, [Forget("0", "1"), Forget("1", "2")])
