"""A run at several strengths, on a sheet, and the choice of one of them as its result."""

import json
import shutil

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_mae import tiny_mae
from torch.testing import assert_close

from sa_diffusers import ConditionalVAE, ConditionalVAEPipeline, MaskedAutoencoderInpaintPipeline
from sa_diffusers.cli.adapters.choose import choose
from sa_diffusers.cli.verify import verify
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.families import family_defaults
from sa_diffusers.io.artifacts import Marker, StageMismatch
from sa_diffusers.io.configuration import config_from_dict, layered
from sa_diffusers.io.loading import model_hash
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.strengths import Strength, chosen, offered


LORA = "pytorch_lora_weights.safetensors"


def config(**options) -> ForgetConfig:
    return ForgetConfig(concept="seven", **options)


def unet(folder) -> dict[str, torch.Tensor]:
    return dict(StableDiffusionPipeline.from_pretrained(folder).unet.state_dict())


def test_what_a_run_offers():
    whole = config(num_train_steps=90, snapshot_steps=[60, 30])
    assert list(map(str, offered(whole))) == ["step 30", "step 60", "step 90"]
    for options in ({}, {"lora_rank": 2, "snapshot_steps": [30]}):
        found = offered(config(strength_scales=[1.5, 0.5], **options))
        assert found == [Strength("scale", 0.5, False), Strength("scale", 1.0, True), Strength("scale", 1.5, False)]
    assert chosen(whole).trained and chosen(config(strength=0.25)) == Strength("scale", 0.25, False)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"strength": 50, "snapshot_steps": [60]}, "expected the step 60, 250, got 50"),
        ({"strength": 0.6}, r"expected the scale 0.25, 0.5, 0.75, 1, 1.25, got 0.6"),
        ({"strength_scales": [5.0]}, "above 0 and at most 4, got 5"),
        ({"strength_sheet": True, "method": "sld-weak"}, "changes no weights, which could be more or less"),
        (
            {"strength_sheet": True, "snapshot_steps": [60], "early_stop": 0.1, "track_steps": 5, "classifier": ["x"]},
            "may end training before one of the snapshots",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(options, says):
    with pytest.raises(ValueError, match=says):
        config(**options)


OPTIONS = {"lora_rank": 2, "ewc_lambda": 0.0, "replay_weight": 0.0, "strength_scales": [0.5, 2.0]}


@pytest.fixture(scope="module")
def adapted(run_cheaply, tmp_path_factory):
    """The folder of a finished run of an adapter, without a sheet."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    run_cheaply(folder, **OPTIONS)
    return folder


@pytest.mark.slow
def test_a_sheet_of_a_finished_run_trains_nothing_and_mixes_weights(adapted, run_cheaply, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "run")
    trained = unet(folder / "pipeline")
    again = run_cheaply(folder, strength_sheet=True, **OPTIONS)
    assert "train" in again.metrics["seconds"]["reused"] and "strength" not in again.metrics
    assert_close(dict(again.pipeline.unet.state_dict()), trained)
    page = (folder / "strength.html").read_text()
    assert "--scale 0.5</pre>" in page and "--scale 1</pre>" not in page and "scale 1, the result" in page
    judged = ("before", "after", "scale_0.5", "scale_2")
    pictures = {n: Findings.load(folder / "evaluation" / f"{n}.safetensors").pictures.float() for n in judged}
    gaps = [(pictures[name] - pictures["before"]).abs().mean() for name in ("scale_0.5", "after", "scale_2")]
    assert 0 < gaps[0] < gaps[1] < gaps[2]


@pytest.mark.slow
def test_a_scale_that_is_chosen_is_the_result_in_all_that_a_run_leaves(adapted, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "run")
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    before, trained, adapter = unet(model), unet(folder / "pipeline"), load_file(folder / "lora" / LORA)
    outcome = choose(folder, "scale", 0.5)
    half = unet(folder / "pipeline")
    assert_close(half, {name: before[name].lerp(value, 0.5) for name, value in trained.items()})
    assert_close(dict(outcome.pipeline.unet.state_dict()), half)
    scaled = StableDiffusionPipeline.from_pretrained(model)
    scaled.load_lora_weights(folder / "lora")
    scaled.fuse_lora()
    scaled.unload_lora_weights()
    assert_close(dict(scaled.unet.state_dict()), half)
    found = Findings.load(folder / "evaluation" / "scale_0.5.safetensors").values
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["strength"] == "scale 0.5" and metrics["after"] == found
    record = json.loads((folder / "pipeline" / "forgotten.json").read_text())["forgotten"][-1]
    assert record["strength"] == "scale 0.5" and record["after"]["unet"] == model_hash(outcome.pipeline.unet)
    assert "| strength | scale 0.5, chosen afterwards |" in (folder / "lora" / "README.md").read_text()
    assert verify(str(folder))[0] == []

    choose(folder, "scale", 1)  # nothing is lost
    assert_close(unet(folder / "pipeline"), trained, rtol=0, atol=0)
    assert_close(load_file(folder / "lora" / LORA), adapter, rtol=0, atol=0)
    assert "strength" not in json.loads((folder / "metrics.json").read_text())
    assert verify(str(folder))[0] == []


@pytest.mark.slow
def test_a_choice_that_is_killed_loses_nothing_of_training(adapted, tmp_path, monkeypatch):
    folder = shutil.copytree(adapted, tmp_path / "run")
    trained = unet(folder / "pipeline")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Marker, "rename", killed)
        choose(folder, "scale", 0.5)
    choose(folder, "scale", 0.5)
    assert verify(str(folder))[0] == []
    assert_close(unet(folder / "trained" / "pipeline"), trained, rtol=0, atol=0)


@pytest.mark.slow
def test_a_choice_is_not_undone_unasked(adapted, run_cheaply, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "run")
    choose(folder, "scale", 0.5)
    with pytest.raises(StageMismatch, match='strength: "scale 0.5" -> "scale 1"'):
        run_cheaply(folder, **OPTIONS)
    assert run_cheaply(folder, strength=0.5, **OPTIONS).metrics["strength"] == "scale 0.5"
    assert "strength" not in run_cheaply(folder, overwrite=True, **OPTIONS).metrics


@pytest.mark.slow
def test_a_damaged_training_is_made_again_beside_the_choice(adapted, run_cheaply, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "run")
    trained = unet(folder / "pipeline")
    choose(folder, "scale", 2)
    double = unet(folder / "pipeline")
    (folder / "trained" / "pipeline" / "model_index.json").unlink()
    assert "train.json" in verify(str(folder))[0][0]
    (folder / ".stages" / "train.json").unlink()
    run_cheaply(folder, strength=2.0, **OPTIONS)
    assert_close(unet(folder / "trained" / "pipeline"), trained)
    assert_close(unet(folder / "pipeline"), double, rtol=0, atol=0)
    assert verify(str(folder))[0] == []


@pytest.mark.parametrize(
    "argument, says",
    [
        (("step", 2), "offers --scale 0.5, --scale 1, --scale 2; expected one of these, got --step 2"),
        (("scale", 0.7), "expected one of these, got --scale 0.7"),
    ],
)
def test_only_what_there_is_can_be_chosen(adapted, tmp_path, argument, says):
    with pytest.raises(ValueError, match=says):
        choose(adapted, *argument)
    with pytest.raises(ValueError, match="expected the folder of a finished run, got"):
        choose(tmp_path, *argument)


@pytest.mark.slow
def test_what_other_strengths_would_break_is_refused(run_cheaply, tmp_path):
    each = run_cheaply(tmp_path / "run", adapters="each", **OPTIONS).output_dir
    files = {path: path.stat().st_mtime_ns for path in each.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="adapters"):
        choose(each, "scale", 0.5)
    assert files == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_what_is_judged_later_is_judged_by_as_much(run_cheaply, tmp_path):
    """The loss on replay samples, too, which nothing else needs any more."""
    options = {"lora_rank": 2, "strength_scales": [0.5]}
    whole = run_cheaply(tmp_path / "run", **options).metrics["after"]
    (tmp_path / "run" / ".stages" / "after.json").unlink()  # as if it had been killed before
    assert run_cheaply(tmp_path / "run", **options).metrics["after"] == whole
    assert choose(tmp_path / "run", "scale", 0.5).metrics["after"].keys() == whole.keys() >= {"replay_loss"}


@pytest.mark.slow
def test_a_snapshot_that_is_chosen(run_cheaply, tmp_path):
    run = {"method": "finetune", "ewc_lambda": 0.0, "replay_weight": 0.0, "snapshot_steps": [2], "ema_decay": 0.5}
    outcome = run_cheaply(tmp_path / "run", strength_sheet=True, strength=2, **run)
    snapshot = unet(tmp_path / "run" / "snapshots" / "step_000002")
    assert_close(unet(tmp_path / "run" / "pipeline"), snapshot, rtol=0, atol=0)
    assert outcome.metrics["strength"] == "step 2" and "step 4" in (tmp_path / "run" / "strength.html").read_text()
    choose(tmp_path / "run", "step", 4)
    assert any((unet(tmp_path / "run" / "pipeline")[n] != value).any() for n, value in snapshot.items())
    shutil.rmtree(tmp_path / "run" / "snapshots")
    assert choose(tmp_path / "run", "step", 4).metrics["verdict"] and verify(str(tmp_path / "run"))[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conditional_vae", "masked_autoencoder"])
def test_other_kinds_of_model_have_strengths(kind, few_pictures, tmp_path):
    if kind == "conditional_vae":
        own = "ConditionalVAEPipeline"
        ConditionalVAEPipeline(
            ConditionalVAE(image_size=8, num_classes=3, hidden_sizes=(12, 8), latent_dim=2)
        ).save_pretrained(tmp_path / "base")
        small = {"num_samples": 20, "fisher_samples": 20, "surrogate": "noise", "concept": "1"}
    else:
        own = "MaskedAutoencoderInpaintPipeline"
        tiny_mae().save_pretrained(tmp_path / "base")
        small = {"method": "encoder", "forget_images": "digits8x8:2", "retain_images": "digits8x8:3"}
        small |= {"images_class": 8, "eval_images_class": 4}
    small |= {"num_train_steps": 2, "train_batch_size": 4, "strength_sheet": True, "strength_scales": [0.5]}
    small |= {"model": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"), "strength": 0.5}
    run_forgetting(config_from_dict(ForgetConfig, layered(ForgetConfig, family_defaults(own), small)))
    module = "vae" if kind == "conditional_vae" else "mae"
    kinds = {"vae": ConditionalVAEPipeline, "mae": MaskedAutoencoderInpaintPipeline}
    base, trained, half = (
        dict(getattr(kinds[module].from_pretrained(tmp_path / part), module).state_dict())
        for part in ("base", "run/trained/pipeline", "run/pipeline")
    )
    assert_close(half, {name: base[name].lerp(value, 0.5) for name, value in trained.items()})
    assert (tmp_path / "run" / "strength.html").exists() and verify(str(tmp_path / "run"))[0] == []
