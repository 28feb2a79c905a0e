"""Runs by other methods than Selective Amnesia: what each trains, needs and leaves, through the same stages."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch.testing import assert_close

from sa_diffusers import methods
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline, SafeGuidancePipeline
from sa_diffusers.runs.forget import Outcome, forget
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.lora import add_lora


OWN = {"num_train_steps": 3}
pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(scope="module")
def start(run_cheaply) -> Callable[..., Outcome]:
    """Run in a folder, from the saved pipeline, with some options changed."""
    return partial(run_cheaply, **OWN)


@pytest.fixture(scope="module")
def shared_fisher(start, tmp_path_factory) -> str:
    return str(start(tmp_path_factory.mktemp("shared") / "run", method="ewc").output_dir / "fisher.safetensors")


def changed_names(folder: Path, base: Path) -> set[str]:
    after, before = (StableDiffusionPipeline.from_pretrained(path).unet.state_dict() for path in (folder, base))
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.slow
def test_safe_latent_diffusion_keeps_the_weights_and_draws_otherwise(start, tiny_pipeline_dir, tmp_path):
    outcome = start(tmp_path / "run", method="sld-strong")
    assert not changed_names(tmp_path / "run" / "pipeline", tiny_pipeline_dir)
    saved = SafeGuidancePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert isinstance(outcome.pipeline, SafeGuidancePipeline)
    assert (saved.config.safety_concept, saved.config.safety_level) == ("seven, 7", "strong")
    before, after = (
        Findings.load(tmp_path / "run" / "evaluation" / f"{name}.safetensors") for name in ("before", "after")
    )
    assert (before.pictures != after.pictures).any()
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "led by Safe Latent Diffusion (strong) away from **seven, 7**" in card and "nine" not in card
    assert "pipeline_tag: text-to-image" in card and "`StableDiffusionPipeline` also loads this folder" in card
    again = start(tmp_path / "run", method="sld-strong")
    assert "train" in again.metrics["seconds"]["reused"] and isinstance(again.pipeline, SafeGuidancePipeline)


@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.slow
def test_a_surrogate_can_be_taught_by_the_frozen_model(lora_rank, start, tmp_path):
    """Its first loss is the distance of two predictions, far below that from the noise."""
    options = {"ewc_lambda": 0.0, "replay_weight": 0.0, "num_train_steps": 1, "lora_rank": lora_rank}
    first = {}
    for target in ("model", "noise"):
        run = start(tmp_path / target, surrogate_target=target, **options).output_dir
        first[target] = json.loads((run / "history.json").read_text())[0]["surrogate_loss"]
    assert 0 < first["model"] < 0.1 * first["noise"]


def test_safe_latent_diffusion_cannot_be_had_in_place(tiny_pipeline):
    with pytest.raises(ValueError, match="not its weights; expected inplace=False"):
        forget(tiny_pipeline(), "seven", "nine", inplace=True, method="sld-medium")


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_snapshots_are_pipelines_on_the_way(lora_rank, start, tmp_path):
    options = {"ema_decay": 0.5, "lora_rank": lora_rank, "method": "finetune"}
    run = start(tmp_path / "run", snapshot_steps=[2, 3], **options).output_dir
    others = {"step_000003": run}
    if lora_rank is None:
        others["step_000002"] = start(tmp_path / "short", **options | {"num_train_steps": 2}).output_dir
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == ["step_000002", "step_000003"]
    for snapshot, whole in others.items():
        saved = StableDiffusionPipeline.from_pretrained(run / "snapshots" / snapshot).unet.state_dict()
        expected = StableDiffusionPipeline.from_pretrained(whole / "pipeline").unet.state_dict()
        assert_close(dict(saved), dict(expected), rtol=0, atol=1e-6)


def test_esd_draws_unclipped_latents_whatever_scheduler_the_model_has():
    """A scheduler that never clips does not say so, and DDIM would clip by default."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for scheduler in (EulerDiscreteScheduler(**schedule), DDIMScheduler(clip_sample=False, **schedule)):
        assert not make_scheduler("ddim", scheduler).config.clip_sample
    assert make_scheduler("ddim", DDPMScheduler(clip_sample=True)).config.clip_sample  # images in [-1, 1]


def test_the_plan_knows_what_a_step_of_each_method_takes():
    def passes(method: str, **options) -> float:
        config = ForgetConfig(concept="seven", method=method, **options)
        return methods.get(method).training_passes(config.resolved())

    assert passes("finetune") == 3
    assert passes("sa") == 2 * 3 + 1  # and the frozen model's
    assert passes("sa", replay_target="noise") == 2 * 3
    assert passes("sa", surrogate_target="model") == 2 * 3 + 2
    assert passes("sa", replay_target="noise", gradient_checkpointing=True) == 2 * 4
    assert passes("esd-x") == 3 + 2 + 49  # of 50 levels half are drawn on average, each with guidance
    assert passes("sa+esd") == passes("sa") + passes("esd-x")


OTHER = {
    "ewc_lambda": 3.0, "replay_weight": 2.0, "surrogate_target": "model", "replay_target": "model", "start": "edit",
    "train_scope": "encoder",
}  # fmt: skip


@pytest.mark.parametrize("method", [name for name, method in methods.registry().items() if method.fixes])
def test_what_a_method_settles_cannot_be_contradicted(method):
    fixes = methods.get(method).fixes
    given = asdict(ForgetConfig(concept="seven", method=method).resolved())
    assert {name: given[name] for name in fixes} == fixes
    assert asdict(ForgetConfig(concept="seven", method=method, **fixes).resolved()) == given  # it may be said
    for name, own in fixes.items():
        with pytest.raises(ValueError, match=f"^{re.escape(method)} works with {name} {own} alone, got {OTHER[name]}"):
            ForgetConfig(concept="seven", method=method, **{name: OTHER[name]})


def test_another_method_does_not_keep_what_the_first_one_settled():
    plain = ForgetConfig(concept="seven").resolved()
    assert (plain.ewc_lambda, plain.replay_weight, plain.train_scope) == (50.0, 1.0, "full")
    for method in ("finetune", "esd-x", "uce"):
        assert replace(ForgetConfig(concept="seven", method=method), method="sa").resolved() == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "stages"),
    [
        pytest.param({"method": "ewc"}, ["surrogate", "before", "train", "after"]),
        pytest.param(
            {"ewc_lambda": 0.0, "replay_weight": 0.0},
            ["surrogate", "before", "train", "after"],
        ),
        (
            {"ewc_lambda": 0.0, "replay_weight": 0.0, "surrogate_target": "model"},
            ["samples", "surrogate", "before", "train", "after"],
        ),
    ],
)
def test_what_is_announced_is_what_runs(options, stages, start, request, tmp_path, capsys):
    """A Fisher that is given takes no samples; a surrogate that is taught does, though nothing is replayed."""
    fisher = {"fisher": request.getfixturevalue("shared_fisher")} if options.get("method") == "ewc" else {}
    capsys.readouterr()  # of the run that the Fisher is of
    outcome = start(tmp_path / "run", **options, **fisher)
    announced = re.findall(r"^  (\w+) .*", capsys.readouterr().out.split("Plan for ")[1], re.MULTILINE)
    assert announced == [*stages[:1], "fisher", *stages[1:], "total"] if fisher else [*stages, "total"]
    assert {path.stem for path in (tmp_path / "run" / ".stages").iterdir()} == {"run", *stages}
    assert (tmp_path / "run" / "samples").exists() == ("samples" in stages)
    assert outcome.metrics["seconds"]["reused"] == list(fisher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "esd-x", "esd_guidance": -1.0}, "esd_guidance >= 0"),
        ({"method": "uce", "uce_regularization": 0.0}, "uce_regularization > 0"),
        ({"method": "uce", "lora_rank": 2}, "adapters are not trained by uce"),
        ({"num_train_steps": 5, "snapshot_steps": [5, 6]}, r"between 1 and num_train_steps 5.*got \[5, 6\]"),
        ({"method": "sld-max", "snapshot_steps": [1]}, "of a method that trains"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ForgetConfig(concept="seven", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "esd-x"},
            "esd-x needs a model that predicts noise at many levels, which a conditional vae does not",
        ),
        ({"method": "sa+esd"}, r"sa\+esd needs a model that predicts noise at many levels, which a conditional vae"),
        (
            {"method": "uce"},
            "uce needs a model that makes keys and values of a text.*, which a conditional vae does not",
        ),
        ({"method": "sld-max"}, "sld-max needs a model that can be led away from a text.*, which a conditional vae"),
        ({"surrogate_target": "model"}, "surrogate_target: this model predicts no noise; expected 'noise'"),
        ({"mixed_precision": "bf16"}, "a ConditionalVAE computes in float32; pass --mixed_precision no"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: a ConditionalVAE has none"),
        (
            {"lora_rank": 2},
            "lora_rank needs a model that takes low-rank adapters, which a conditional vae does not; omit it",
        ),
    ],
)
def test_what_a_vae_cannot_is_refused(options, message):
    vae = ConditionalVAE(image_size=4, hidden_sizes=(8,), latent_dim=2, num_classes=2)
    with pytest.raises(ValueError, match=message):
        forget(ConditionalVAEPipeline(vae), "0", "1", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "uce", "surrogate": "noise"}, "expected a prompt as surrogate"),
        ({"method": "sld-weak", "guidance_scale": 1.0}, "expected guidance_scale > 1"),
        (
            {"method": "esd-x", "esd_weight": 2.0},
            "esd-x has no term beside ESD's to weigh it against; omit esd_weight",
        ),
        ({"mixed_precision": "fp16"}, "float16 is not for training on a CPU; pass --mixed_precision bf16"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(options, message, start, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "samples").exists() and not (tmp_path / "run" / "evaluation").exists()


def test_a_pipeline_with_adapters_is_refused(tiny_pipeline):
    """Its weights have other names then, and what is saved could not be loaded."""
    pipeline = tiny_pipeline()
    add_lora(pipeline.unet, adapted_layers(pipeline.unet, "full", "attention"), 2, 2.0, seed=0)
    with pytest.raises(ValueError, match="has adapters loaded; fuse or unload them first"):
        forget(pipeline, "seven", "nine")


@pytest.mark.slow
def test_overwriting_by_another_method_removes_adapter_and_snapshots(start, tmp_path):
    start(tmp_path / "run", method="esd-x", lora_rank=2, snapshot_steps=[2])
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "run" / "snapshots").exists()
    start(tmp_path / "run", method="finetune", overwrite=True)
    assert not (tmp_path / "run" / "lora").exists() and not (tmp_path / "run" / "snapshots").exists()
