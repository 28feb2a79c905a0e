"""Whole runs on every large text-to-image family: forget, save, judge, go on, load."""

import json
import math

import pytest
from cheap_runs import CHEAP, PROMPTS
from tiny_text_to_image import NAMES, make
from torch.testing import assert_close

from sa_diffusers import methods
from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.attacks.run import run_attack
from sa_diffusers.core.fisher_file import Fisher
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.evaluation.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.evaluate import evaluate_pipelines
from sa_diffusers.families import get_family
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs.forget import forget


METHODS = {
    "edited": {"method": "uce"},
    "adapters": {"lora_rank": 2, "start": "edit", "replay_negative": "open", "negative_guidance_scale": 2.0},
    "weights": {"train_scope": "xattn"},
    "finished": {"lora_rank": 2, "lora_targets": "attention", "robust": True},
    "finetuned": {"method": "finetune", "train_scope": "pooled"},
    "led away": {"method": "esd-x"},
    "projected": {"method": "pcgrad-symmetric"},
}
CASES = [(name, method) for name in NAMES for method in METHODS if name != "klein"]
CASES += [("klein", "adapters")]
# The others that train or edit, each on two models.
METHODS |= {
    name: {"method": name}
    for name in ("ewc", "replay", "naive", "projection-symmetric", "sa+esd", "esd-u", "esd-x-strict", "speed")
}
ROBUST = {
    "robust_weight": 2.0, "robust_every": 2, "robust_steps": 1, "robust_samples": 4, "train_batch_size": 4,
    "num_surrogate_samples": 12, "replay_negative": "mixture",
}  # fmt: skip
METHODS |= {"robust": ROBUST, "robust embedding": ROBUST | {"robust_embedding": 0.1}}
CASES += [(name, "robust") for name in ("xl", "sd3", "flux-dev")] + [("flux-dev", "robust embedding")]
CASES += [(name, method) for name in ("xl", "sd3") for method in ("ewc", "projection-symmetric", "esd-u", "speed")]
CASES += [(name, method) for name in ("xl-v", "flux-dev") for method in ("replay", "naive", "sa+esd", "esd-x-strict")]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "replay.txt").write_text("\n".join(PROMPTS))
    (folder / "templates.txt").write_text("a {}\na red {}")
    return {"replay_prompts": str(folder / "replay.txt"), "concept_templates": str(folder / "templates.txt")}


def cheap(changes: dict) -> dict:
    settled = methods.get(changes.get("method", methods.DEFAULT)).fixes
    own = {name: value for name, value in CHEAP.items() if name not in settled}
    return own | {"concept": "seven", "surrogate": "nine"} | changes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_run(name, method, files, few_pictures, tiny_tokenizer, tmp_path):
    pipeline = make(name, tiny_tokenizer)
    options = cheap(METHODS[method]) | files | {"output_dir": tmp_path}
    trained = get_family(pipeline).component
    forgotten = forget(pipeline, **options)
    before, after = (dict(getattr(one, trained).named_parameters()) for one in (pipeline, forgotten))
    changed = {name for name, weight in after.items() if not weight.equal(before[name])}
    scopes = get_family(forgotten).scopes
    assert any(map(scopes["noxattn" if method == "esd-u" else "pooled" if "pooled" in scopes else "xattn"], changed))
    assert changed and all(weight.isfinite().all() for weight in after.values())
    assert json.loads((tmp_path / "metrics.json").read_text())["after"].keys() == forgotten.metrics["after"].keys()
    tag = get_family(pipeline).name.replace("_", "-")
    assert f"- {tag}" in (tmp_path / "pipeline" / "README.md").read_text()
    loaded = load_pipeline(str(tmp_path / "pipeline"), None, None, "float32")
    assert type(loaded) is type(pipeline)
    assert_close(dict(getattr(loaded, trained).named_parameters()), after, rtol=0, atol=0)
    if (tmp_path / "fisher.safetensors").exists():
        metadata, loss = Fisher.load(tmp_path / "fisher.safetensors").metadata, get_family(pipeline).loss
        assert {key: metadata[key] for key in loss.grid} == loss.grid and metadata["num_terms"] == 20
        assert loss.grid == ({} if name.startswith("xl") else {"shift": 3.0 if name.startswith("sd3") else 1.0})
    again = forget(pipeline, **options)
    assert again.metrics["after"] == forgotten.metrics["after"]
    assert set(again.metrics["seconds"]["reused"]) >= {"train", "before", "after"}
    if method == "adapters":
        stock = make(name, tiny_tokenizer)
        stock.load_lora_weights(tmp_path / "lora")
        module = getattr(stock, trained)
        module.fuse_lora()
        module.unload_lora()
        assert_close(dict(module.named_parameters()), after, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_noise_levels_of_training_are_as_the_options_say(files, few_pictures, tiny_tokenizer, tmp_path):
    pipeline, trained = make("sd3", tiny_tokenizer), []
    for changes in ({}, {"density": "logit_normal"}, {"weighting": "preconditioned"}):
        options = cheap({"train_scope": "pooled"} | changes) | files | {"output_dir": tmp_path / "_".join(changes)}
        trained.append(dict(forget(pipeline, **options).transformer.named_parameters()))
    plain, *others = trained
    assert all(any(not weight.equal(plain[name]) for name, weight in other.items()) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xl", "sd3"])
def test_a_run_that_leads_away_while_it_draws(name, files, few_pictures, tiny_tokenizer, tmp_path):
    pipeline = make(name, tiny_tokenizer)
    options = cheap({"method": "sld-strong"}) | files | {"output_dir": tmp_path}
    forgotten = forget(pipeline, **options)
    before, after = (Findings.load(tmp_path / "evaluation" / f"{when}.safetensors") for when in ("before", "after"))
    assert (before.pictures != after.pictures).any()
    saved, family = str(tmp_path / "pipeline"), get_family(forgotten)
    loaded = load_pipeline(saved, None, None, "float32")
    assert type(loaded) is type(forgotten) and isinstance(loaded, family.own_classes)
    assert (loaded.config.safety_concept, loaded.config.safety_level) == ("seven", "strong")
    weights = (dict(getattr(one, family.component).named_parameters()) for one in (pipeline, loaded))
    assert_close(*weights, rtol=0, atol=0)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    stock = type(pipeline).__name__
    assert f"import {type(loaded).__name__}" in card and f"`{stock}` also loads this folder" in card
    type(pipeline).from_pretrained(saved, **{name: None for name, part in pipeline.components.items() if part is None})
    again = forget(pipeline, **options)
    assert "train" in again.metrics["seconds"]["reused"] and type(again) is type(loaded)
    pipeline.save_pretrained(tmp_path / "knows")
    found = evaluate_pipelines(
        PipelineEvaluationConfig(
            pipeline=str(tmp_path / "knows"), compare=[saved], metrics="change", sets="concept", concept="seven",
            templates=files["concept_templates"], num_images=2, num_inference_steps=2, batch_size=2,
            output_dir=str(tmp_path / "judged"),
        )
    )  # fmt: skip
    assert len(found["pipelines"]) == 2


REFUSED = [
    ("xl", {"weighting": "preconditioned"}, "are of models that draw by a velocity; omit them"),
    ("flux-dev", {"method": "sld-weak"}, "needs a model that can be led away from a text while it draws"),
    ("klein", {"method": "sld-max"}, "needs a model that can be led away from a text while it draws"),
    ("flux-dev", {"sampler": "dpmsolver++"}, "a flow is drawn by the sampler pipeline or ddim"),
    ("xl", {"train_scope": "context"}, "one of full, xattn, xattn-strict, noxattn, pooled, got 'context'"),
    ("klein", {"train_scope": "pooled"}, "one of full, xattn, xattn-strict, noxattn, got 'pooled'"),
    ("klein-distilled", {}, "so no prompt leads away; expected none or mixture, got 'open'"),
]


@pytest.mark.parametrize(("name", "changes", "says"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(name, changes, says, files, tiny_tokenizer, tmp_path):
    options = cheap(changes) | files | {"output_dir": tmp_path / "run"}
    with pytest.raises(ValueError, match=says):
        forget(make(name, tiny_tokenizer), **options)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_parts_that_do_not_fit_are_refused(tiny_tokenizer):
    from diffusers import DDIMScheduler

    for name, part, wrong, says in (
        ("sd3", "scheduler", DDIMScheduler(), "scheduler is a DDIMScheduler; expected the FlowMatchEuler"),
        ("xl", "text_encoder", None, "has no text_encoder"),  # as of a refiner
        ("flux-dev", "transformer", {"in_channels": 32}, "in_channels 32, expected 16"),
        ("sd3-t5", "transformer", {"joint_attention_dim": 16}, "joint_attention_dim 16, expected 32"),
        ("klein", "transformer", {"joint_attention_dim": 8}, "joint_attention_dim 8, expected 24"),
        ("xl", "unet", {"addition_embed_type": None}, "addition_embed_type None, expected 'text_time'"),
    ):
        pipeline = make(name, tiny_tokenizer)
        if isinstance(wrong, dict):
            getattr(pipeline, part).register_to_config(**wrong)
        else:
            setattr(pipeline, part, wrong)
        with pytest.raises(ValueError, match=says):
            get_family(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pipelines_are_judged_and_attacked(name, files, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("sa_diffusers.attacks.target_loss.NUM_FIXED", 16)
    for folder, seed in (("knows", 0), ("forgot", 1)):
        make(name, tiny_tokenizer, seed).save_pretrained(tmp_path / folder)
    knows, forgot = (str(tmp_path / folder) for folder in ("knows", "forgot"))
    drawn = {"concept": "seven, 7", "num_images": 2, "num_inference_steps": 2, "batch_size": 2}
    found = evaluate_pipelines(
        PipelineEvaluationConfig(
            pipeline=knows, compare=[forgot], metrics="change", sets="concept", templates=files["concept_templates"],
            output_dir=str(tmp_path / "judged"), **drawn,
        )
    )  # fmt: skip
    sampler = found["pipelines"]["knows"]["settings"]["sampler"]
    assert sampler == ("dpmsolver++" if name.startswith("xl") else "pipeline")
    attacked = run_attack(
        AttackConfig(
            original=knows, forgotten=forgot, templates=["a {}"], num_targets=2, num_restarts=1, steps=1,
            sample_batch_size=2, output_dir=str(tmp_path / "attacked"), **drawn,
        )
    )  # fmt: skip
    losses = attacked["models"]["forgotten"]["restarts"][0]["losses"]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
