"""The measurement of a base pipeline, on an untrained one: complete, repeatable, and written down."""

import json

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sa_diffusers.families import get_family
from sa_diffusers.io.bundled import resolve
from sa_diffusers.models.tokenizer import train_tokenizer
from scripts import evaluate_base
from studies.base_quality import composed_prompts, draw_images


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    with open(resolve("bundled/digits/architecture.yaml")) as file:
        architecture = yaml.safe_load(file)
    tokenizer = train_tokenizer([p.text for p in composed_prompts(200, seed=0)], num_merges=50, max_length=40)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(vocab_size=len(tokenizer), **architecture["text_encoder"], **ids)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**architecture["vae"]),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**architecture["unet"]),
        scheduler=DDIMScheduler(**architecture["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_images_do_not_depend_on_the_batch_size(pipeline):
    options = {"seed": 0, "guidance_scale": 2.0, "num_inference_steps": 2}
    prompts = composed_prompts(5, seed=0)
    images = draw_images(get_family(pipeline), prompts, **options, batch_size=5)
    assert images.shape == (5, 3, 32, 32)
    torch.testing.assert_close(draw_images(get_family(pipeline), prompts, **options, batch_size=2), images)


@pytest.mark.slow
def test_script_measures_everything(pipeline, tmp_path, monkeypatch, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "run" / "data").mkdir(parents=True)
    # In place of MNIST: redrawn strokes are read from the run's folder where they lie there already.
    strokes = {"coverage": torch.randint(0, 255, (40, 2, 32, 32)).byte(), "label": torch.arange(40) % 10}
    save_file(strokes, tmp_path / "run" / "data" / "strokes_test_0.safetensors")
    options = "--num_images 20 --num_held_out_images 38 --num_inference_steps 2"
    folders = ["--model", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["evaluate_base.py", *options.split(), *folders])
    evaluate_base.main()

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    names = [row["name"] for row in metrics["bars"]]
    for attribute in ("digit", "ink", "background", "stroke"):
        assert {attribute, f"{attribute}, worst class", f"{attribute}, held-out frames"} <= set(names)
        low, high = metrics["composed"][attribute]["interval"]
        assert 0 <= low <= metrics["composed"][attribute]["accuracy"] <= high <= 1
    assert {"recall against real", "coverage against real"} <= set(names)
    assert len(metrics["templates"]) == 38
    assert metrics["config"]["num_images"] == 20
    assert (tmp_path / "run" / "images.png").stat().st_size > 0
    assert "BELOW" in capsys.readouterr().out
