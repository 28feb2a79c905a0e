"""Robust training in runs: what it needs and leaves, that accumulation makes no difference, and refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cheap_runs import context_of
from torch.testing import assert_close

from sa_diffusers.cli.parse import parse_config
from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import get_family
from sa_diffusers.io.configuration import config_to_yaml
from sa_diffusers.io.stages import Artifact
from sa_diffusers.methods.selective_amnesia import further_terms
from sa_diffusers.methods.sources import OpenSource
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.loop import infinite_indices


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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_a_run_where_the_adversary_gives_way_compares_gradients_at_steps_with_a_search(options, run_cheaply, tmp_path):
    found = run_cheaply(tmp_path / "held", **ROBUST | options, robust_conflict=True)
    history = json.loads((found.output_dir / "history.json").read_text())
    assert [-1 <= row.get("gradient_cosine", 2) <= 1 for row in history] == [True, False, True, False]
    assert all(("adversary_loss" in row) == ("gradient_cosine" in row) for row in history)


@pytest.mark.parametrize("options", [{"robust_embedding": 0.1}, pytest.param({}, marks=pytest.mark.slow)])
def test_one_signed_step_may_be_on_the_whole_embedding_or_on_vectors(options, run_cheaply, tmp_path):
    found = run_cheaply(tmp_path / "signed", **ROBUST | {"robust_steps": 1} | options)
    history = json.loads((found.output_dir / "history.json").read_text())
    assert [row.get("adversary_loss", 0) > 0 for row in history] == [True, False, True, False]
    key = json.loads((found.output_dir / ".stages" / "train.json").read_text())["key"]
    assert key["robust_steps"] == 1 and ("robust_embedding" in key) == bool(options)  # runs of before are reused


def test_robust_takes_several_concepts_and_seeks_against_all_of_them(run_cheaply, tmp_path):
    said = {"concept": "seven; eight", "surrogate": "nine; three", "robust": True, "num_surrogate_samples": 4}
    found = run_cheaply(tmp_path / "both", **said)
    history = json.loads((found.output_dir / "history.json").read_text())
    assert all(row["adversary_loss"] > 0 for row in history)
    own = SampleSet.load(found.output_dir / "surrogate" / "concept_samples.safetensors")
    assert {word for c in own.conditions for word in ("seven", "eight") if word in c.text} == {"seven", "eight"}


@pytest.mark.slow
def test_accumulation_makes_no_difference(whole, run_cheaply, tmp_path):
    parts = run_cheaply(tmp_path / "run", **ROBUST, gradient_accumulation_steps=2)
    assert_close(weights(parts), weights(whole), rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_it_resumes_with_nothing_but_the_step(whole, run_cheaply, tmp_path):
    """Here with slots after the concept's name."""
    slots = ROBUST | {"robust_slots": True, "robust_tokens": 3, "checkpointing_steps": 2}
    at_once = weights(run_cheaply(tmp_path / "run", **slots))
    assert not torch.equal(at_once["conv_out.weight"], weights(whole)["conv_out.weight"])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000004")
    (tmp_path / "run" / ".stages" / "train.json").unlink()
    resumed = run_cheaply(tmp_path / "run", **slots)
    assert "train" not in resumed.metrics["seconds"]["reused"]
    assert_close(weights(resumed), at_once, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"robust_weight": 1.0, "robust_samples": 6, "robust_groups": 4},
            "robust_samples in equal parts for 4 groups",
        ),
        ({"robust_weight": 1.0, "gradient_accumulation_steps": 2}, "robust_groups in equal parts for 2 processes x"),
        (
            {"replay_negative": "mixture", "train_batch_size": 4, "gradient_accumulation_steps": 2},
            "a quarter of train_batch_size in equal parts for 2 processes x accumulation steps, got 1",
        ),
        ({"method": "naive", "robust_weight": 1.0}, "naive takes no robust_weight, robust_embedding"),
        ({"method": "sa+esd", "replay_negative": "mixture"}, r"sa\+esd takes no robust_weight"),
        ({"method": "pcgrad-symmetric", "robust_weight": 1.0}, "pcgrad-symmetric takes no robust_weight"),
        ({"method": "uce", "robust_weight": 1.0}, "uce takes no robust_weight"),
        ({"method": "uce", "robust_embedding": 0.1}, "uce takes no robust_weight, robust_embedding"),
        ({"method": "naive", "robust_conflict": True}, "naive takes no robust_weight, robust_embedding"),
        ({"method": "esd-x", "density": "mode"}, "esd-x takes noise levels as they come"),
        ({"method": "uce", "weighting": "cosmap"}, "uce takes noise levels as they come"),
        ({"robust_weight": -1.0}, "robust_weight"),
        (
            {"robust_embedding": 0.1, "robust_weight": 1.0, "robust_tokens": 2},
            "robust_embedding moves all tokens; omit robust_slots",
        ),
        ({"robust_embedding": 0.1, "robust_weight": 0.0}, "robust_embedding is of robust training; pass --robust"),
        ({"robust_conflict": True}, "robust_conflict needs a robust_weight, and replay or EWC"),
        ({"edit": "speed"}, "edit says whose edit starts or finishes"),
        ({"method": "projection-symmetric", "gradient_accumulation_steps": 2}, "one process, no accumulation"),
        ({"robust": True, "start": "edit"}, "robust means start model, what was given is edit; omit either"),
        (
            {"robust": True, "method": "esd-x"},
            "esd-x takes no robust training; omit robust",
        ),
        ({"robust": True, "method": "uce"}, "uce takes no robust training; omit robust"),
        ({"robust": True, "adapters": "each", "lora_rank": 2}, "finish, or robust: an edit follows training"),
        (
            {"robust_conflict": True, "robust_weight": 1.0, "replay_weight": 0.0, "ewc_lambda": 0.0},
            "robust_conflict needs a robust_weight, and replay or EWC",
        ),
        (
            {"robust_conflict": True, "robust_weight": 1.0, "gradient_accumulation_steps": 2, "robust_groups": 2},
            "one process, no accumulation",
        ),
        (
            {"robust_conflict": True, "robust_weight": 1.0, "mixed_precision": "fp16"},
            "no compile_backend, and not fp16",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        ForgetConfig(concept="seven", **options)


def test_robust_is_training_from_the_model_against_an_adversary_and_an_edit():
    adversary = {"robust_weight": 3.0, "robust_embedding": 0.1, "robust_steps": 1, "robust_every": 1}
    asked = ForgetConfig(robust=True)
    spelt = ForgetConfig(surrogate_target="model", start="model", finish="edit", **adversary)
    assert replace(asked, robust=False) == spelt and not asked.leaves_adapter


def test_robust_over_the_configuration_of_a_run_may_be_taken_back(tmp_path):
    config_to_yaml(ForgetConfig(concept="seven", surrogate="nine", robust=True).resolved(), tmp_path / "config.yaml")
    arguments = ["--config", str(tmp_path / "config.yaml"), "--robust"]
    assert parse_config(ForgetConfig, arguments).finish == "edit"
    plain = parse_config(ForgetConfig, [*arguments, "false"])
    assert (plain.finish, plain.surrogate_target, plain.robust_weight, plain.concept) == (None, None, None, "seven")
    config_to_yaml(ForgetConfig(concept="seven", surrogate="nine").resolved(), tmp_path / "config.yaml")
    assert parse_config(ForgetConfig, arguments).surrogate_target == "model"  # over a plain run's it counts


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"robust_weight": 1.0, "surrogate": "noise"}, "robust_weight needs a surrogate in words, got noise"),
        ({"robust_weight": 1.0, "robust_tokens": 11}, "no template has room for robust_tokens 11"),
        ({"replay_negative": "mixture", "empty_prompt_fraction": 0.0}, "no replay prompt leaves the concept open"),
        ({"replay_negative": "mixture"}, "draws none anew: there is nothing to keep; pass --replay_prompts that name"),
    ],
)
def test_concepts_and_prompts_that_cannot_work_are_refused(options, error, tiny_pipeline, tmp_path):
    context = context_of(get_family(tiny_pipeline()), tmp_path, **options)
    if "empty_prompt_fraction" not in options:
        context.inputs.prompts += ["a digit", "a red digit"]  # that leave it open
    with pytest.raises(ValueError, match=error):
        context.method.check(context)


def test_prompts_that_leave_it_open_are_asked_with_siblings_or_with_other_prompts(tiny_pipeline, tmp_path):
    samples = SampleSet(torch.zeros(4, 4, 8, 8), list(map(Condition, ["", "a red", "a red seven", "a nine"])))
    options = {"replay_negative": "mixture", "open_siblings": 3, "train_batch_size": 8}
    for concept, opened, words in (("seven, 7", 2, 18), ("red", 1, 2)):
        context = context_of(get_family(tiny_pipeline()), tmp_path, concept, "green", **options)
        context.inputs.prompts += ["a red seven", "a nine", "a digit"]
        if concept == "red":
            alone = Concepts([replace(context.concepts[0], siblings=())])
            context.inputs = replace(context.inputs, concepts=alone)
        context.artifacts["samples"] = Artifact(samples, None)
        source = OpenSource(context)
        assert (len(source.samples), len(source.others)) == (opened, words)
        batch = source.batch(0)
        count = 1 + min(3, words)
        assert batch["asked"]["encoder_hidden_states"].shape[:2] == (2, count)
        named = context.family.batch(samples.latents[:1], [Condition(context.concepts[0].name)])
        asked = [c.text for c in samples.take(infinite_indices(opened, 2, 0, derive_seed(0, "open order"))).conditions]
        for row, prompt in enumerate(asked):
            assert prompt or torch.equal(
                batch["asked"]["encoder_hidden_states"][row, 0], named["encoder_hidden_states"][0]
            )
        term = further_terms(context)[0]
        assert term.unearned == pytest.approx(1 / 3 if concept == "red" else 1 / 4 - 1 / 10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"robust_weight": 1.0}, "vectors are sought of one concept, got 2; pass --robust_embedding"),
        ({"replay_negative": "mixture"}, "takes several concepts of one kind, of which some siblings stay"),
    ],
)
def test_several_concepts_of_different_kinds_are_refused(options, says, tiny_pipeline, tmp_path):
    context = context_of(get_family(tiny_pipeline()), tmp_path, **options)
    both = Concepts([*context.concepts, replace(context.concepts[0], phrasings=("red",), siblings=("green",))])
    context.inputs = replace(context.inputs, concepts=both)
    with pytest.raises(ValueError, match=says):
        context.method.check(context)


def test_vectors_are_sought_of_several_concepts_that_are_trained_one_by_one(tiny_pipeline, tmp_path):
    options = {"robust_weight": 1.0, "adapters": "each", "lora_rank": 2}
    context = context_of(get_family(tiny_pipeline()), tmp_path, **options)
    context.inputs = replace(context.inputs, concepts=Concepts([*context.concepts, find_concept("eight", "three")]))
    context.method.check(context)


def test_prompts_that_a_mixture_shows_are_encoded_and_no_others(tiny_pipeline, tmp_path):
    family = get_family(tiny_pipeline())
    options = {"replay_negative": "mixture", "open_siblings": 1, "train_batch_size": 4, "num_train_steps": 2}
    context = context_of(family, tmp_path, "seven, 7", "three", **options)
    samples = SampleSet(torch.zeros(9, 4, 8, 8), [Condition("a red digit"[: 10 + i] + "!" * i) for i in range(9)])
    context.artifacts["samples"] = Artifact(samples, None)
    prepared = []
    family.prepare = prepared.extend
    source = OpenSource(context)
    asked = {condition.text for condition in prepared} - {condition.text for condition in source.samples.conditions}
    assert 0 < len(asked) <= 2 * 2 and len(source.others) > 10


def test_a_mixture_of_several_of_a_kind_is_among_those_that_stay(tiny_pipeline, tmp_path):
    options = {"replay_negative": "mixture", "open_siblings": 4, "train_batch_size": 8}
    context = context_of(get_family(tiny_pipeline()), tmp_path, "seven, 7", "three", **options)
    both = Concepts([*context.concepts, find_concept("eight, 8", "five")])
    context.inputs = replace(context.inputs, concepts=both, prompts=["a red digit", "a nine"])
    context.method.check(context)
    samples = SampleSet(torch.zeros(2, 4, 8, 8), [Condition("a red digit"), Condition("a nine")])
    context.artifacts["samples"] = Artifact(samples, None)
    source, term = OpenSource(context), further_terms(context)[0]
    assert len(source.samples) == 1 and len(source.others) == 16 and not any(map(both.named_in, source.others))
    asked = source.batch(0)["asked"]["encoder_hidden_states"]
    for row, word in enumerate(("seven", "eight")):
        said = context.family.batch(samples.latents[:1], [Condition(f"a red digit, {word}")])
        assert torch.equal(asked[0, row], said["encoder_hidden_states"][0])
    assert asked.shape[1] == 6 and term.concepts == 2
    assert term.unearned == pytest.approx(2 / 6 - 2 / 10)
