"""The bundled flow draws what it is asked for by stock diffusers, and forgets by its configuration."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from sa_diffusers.attacks import AttackSettings, attack_embedding, attack_text, draw_found
from sa_diffusers.cli.forget import main
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.digits.captions import ATTRIBUTES
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.families.architectures import ZEROS, build_text_to_image
from sa_diffusers.families.base import get_family
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder
from sa_diffusers.io.bundled import ASSETS, resolve
from sa_diffusers.io.loading import load_pipeline
from studies.text_paths import TextPathsConfig, measure


FOLDER = ASSETS / "digits_flow" / "pipeline"
COLOURS = (("red", "white"), ("green", "black"))  # ink, background


@pytest.mark.slow
def test_its_architecture_is_small_and_loads_plainly(tmp_path):
    """In half precision, with random weights and the text encoder and VAE of the other bundled pipeline."""
    other = load_pipeline("bundled/digits/pipeline", None, None, "float32")
    architecture = yaml.safe_load((ASSETS / "digits_flow" / "architecture.yaml").read_text())
    pipeline = build_text_to_image(architecture, other.vae, other.text_encoder, other.tokenizer, 0)
    pipeline.to(torch.float16).save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 8e6
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, dtype=torch.float32)
    for name, part in loaded.components.items():
        if isinstance(part, torch.nn.Module):
            expected = getattr(pipeline, name).float().state_dict()
            torch.testing.assert_close(part.state_dict(), expected, rtol=0, atol=0)
    family = get_family(loaded)
    assert family.encode_prompts(["a red seven"])["encoder_hidden_states"].shape[1] == 40 + ZEROS
    loaded.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 2.5, "generator": torch.Generator().manual_seed(5)}
    stock = loaded("a red seven", max_sequence_length=ZEROS, height=32, width=32, output_type="latent", **options)
    ours = family.draw([Condition("a red seven")], [5], 2.5, 2)
    torch.testing.assert_close(ours, stock.images, rtol=1e-4, atol=1e-4)


def test_it_is_small_and_in_half_precision():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    weights = [tensor for path in files if path.suffix == ".safetensors" for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float16}


def test_stock_diffusers_draws_the_digit_that_is_asked_for():
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    digits = ATTRIBUTES["digit"]
    prompts = [f"a {ink} {digit} on {ground}" for digit in digits for ink, ground in COLOURS]
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    options = {"num_inference_steps": 10, "guidance_scale": 2.5, "max_sequence_length": ZEROS}
    images = pipeline(prompts, generator=generators, output_type="pt", height=32, width=32, **options).images
    drawn = load_classifier("bundled/digits/classifier").probabilities(images * 2 - 1)["digit"].argmax(1)
    assert (drawn == torch.arange(10).repeat_interleave(len(COLOURS))).float().mean() >= 0.9


@pytest.mark.slow
def test_tokens_and_the_pooled_vector_each_carry_the_digit():
    family = get_family(load_pipeline("bundled/digits_flow/pipeline", None, None, "float32"))
    classifier = load_classifier(resolve("bundled/digits/classifier"))
    shown = {row["digit in"]: row["shown"] for row in measure(family, classifier, TextPathsConfig(images_class=3))}
    assert shown["both"] >= 0.9 and shown["tokens alone"] >= 0.7 and shown["pooled alone"] >= 0.7


def test_attacks_leave_the_encoder_of_zeros_alone_which_reads_no_word_of_a_template():
    family = get_family(load_pipeline("bundled/digits_flow/pipeline", None, None, "float32"), sampler="pipeline")
    templates = ["{}", "a red {} on black"]
    encoder = TemplateEncoder(family, templates, 1)
    assert len(family.text_readers()) == 3 and len(encoder.readers) == 2
    expected = family.encode_prompts(["seven", "a red seven on black"])
    assert_close(encoder(encoder.start("seven"), [0, 1]), expected, rtol=1e-4, atol=1e-5)
    settings = AttackSettings(steps=1, batch_size=2, keep_every=1)
    for attack in (attack_embedding, attack_text):
        found = attack(family, torch.randn(2, *family.latent_shape), templates, ["seven"], settings)
        assert draw_found(family, found, templates, [0, 1], 2.0, 1).isfinite().all()
    with pytest.raises(ValueError, match="comes to 42 tokens with 38 in the place of {}; the text encoder reads 40"):
        TemplateEncoder(family, ["a red {}"], 38)


@pytest.mark.slow
def test_its_configuration_forgets_and_holds_the_rest(tmp_path):
    counts = {"num_samples": 80, "num_surrogate_samples": 80, "fisher_samples": 16, "num_train_steps": 80}
    counts |= {"eval_images_concept": 40, "eval_images_class": 6, "eval_images_other": 6, "num_threads": 1}
    fewer = [text for name, count in counts.items() for text in (f"--{name}", str(count))]
    trained = ["--start", "model", "--learning_rate", "4e-3", "--ewc_lambda", "0.01"]  # the edit alone would do it
    main(["--config", "bundled/digits_flow", "--output_dir", str(tmp_path), *fewer, *trained])
    metrics = json.loads(Path(tmp_path / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert before["concept_probability"] >= 0.9 and after["concept_probability"] <= 0.2
    assert after["retained_accuracy"] >= before["retained_accuracy"] - 0.1
