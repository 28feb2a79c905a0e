"""Training a base model from captioned images: its tokenizer, its parts, and the pipeline that it leaves."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tiny_text_to_image import make
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import CLIPTextConfig, CLIPTextModel

from sa_diffusers.core.objectives import CaptionMatching
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.images import CaptionedImageFolder
from sa_diffusers.families import get_family
from sa_diffusers.models.tokenizer import train_tokenizer
from sa_diffusers.runs.base.text_to_image import BaseConfig, CaptionedLatents, TrainableMatcher, train_base
from sa_diffusers.training.loop import TrainingConfig, train


COLOURS = ("red", "green", "blue", "white")
ARCHITECTURE = {
    "vae": {
        "block_out_channels": [4, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "layers_per_block": 1, "norm_num_groups": 2,
        "mid_block_add_attention": False, "sample_size": 32, "latent_channels": 4,
    },
    "text_encoder": {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 12, "projection_dim": 8,
    },
    "unet": {
        "sample_size": 8, "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2,
        "attention_head_dim": 2, "cross_attention_dim": 8, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "scheduler": {"num_train_timesteps": 20, "clip_sample": False, "steps_offset": 1},
}  # fmt: skip


def test_the_end_token_has_the_largest_id(tiny_tokenizer):
    """CLIPTextModel looks for it there."""
    assert sorted(tiny_tokenizer.get_vocab().values()) == list(range(len(tiny_tokenizer)))
    assert tiny_tokenizer.eos_token_id == len(tiny_tokenizer) - 1
    assert tiny_tokenizer("red").input_ids[-1] == tiny_tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    ["a red seven on white", "zyxwvut qpl, 407!", "un été à Zürich", "数字の七", "7️⃣"],
    ids=["seen", "unseen", "accents", "another script", "emoji"],
)
def test_every_text_comes_back_without_an_unknown_token(text):
    tokenizer = train_tokenizer(["a red seven on white"] * 3, num_merges=20, max_length=77)
    first, *ids, last = tokenizer(text).input_ids
    assert (first, last) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_merges_shorten_what_was_seen():
    captions = ["seven green digits"] * 3
    lengths = [len(train_tokenizer(captions, count, 77)("seven green digits").input_ids) for count in (0, 5, 100)]
    assert lengths == [18, lengths[1], 5]
    assert 5 < lengths[1] < 18


def test_of_pairs_as_frequent_the_same_is_merged_every_time():
    words = " ".join(map("".join, itertools.product("bdgjk", "aeiou", "lmnr")))
    vocabularies = [train_tokenizer([words] * 3, num_merges=100, max_length=12).get_vocab() for _ in range(4)]
    assert vocabularies[1:] == vocabularies[:-1]


def test_matching_learns_which_caption_is_whose(tiny_tokenizer):
    ids = {f"{name}_token_id": getattr(tiny_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(vocab_size=len(tiny_tokenizer), **ARCHITECTURE["text_encoder"], **ids)
    model = TrainableMatcher(CLIPTextModel(config), latent_channels=4, width=16)
    captions = ["a red seven", "a green nine", "a blue six", "two on white"]
    tokens = tiny_tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    batch = {"sample": torch.randn(4, 4, 8, 8), "input_ids": tokens}
    settings = TrainingConfig(num_train_steps=40, train_batch_size=4, learning_rate=1e-2)
    history = train(model, CaptionMatching(), lambda step: batch, settings, seed=0)
    assert history[0]["loss"] > 1
    assert history[-1]["loss"] < 0.1
    assert history[-1]["matched"] == 1


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> CaptionedImageFolder:
    """12 pictures of 32x32: a square in a colour, somewhere."""
    folder, lines = tmp_path_factory.mktemp("images"), []
    for index in range(12):
        picture, colour = Image.new("RGB", (32, 32)), COLOURS[index % 4]
        picture.paste(colour, (index, 2 * index, index + 10, 2 * index + 10))
        picture.save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a {colour} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return CaptionedImageFolder(str(folder), resolution=32)


def count_steps(images: CaptionedImageFolder, config: BaseConfig) -> int:
    """Train, and return the number of optimiser steps that it took."""
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        train_base(images, config)
    finally:
        hook.remove()
    return len(steps)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> BaseConfig:
    """Three steps a part; the last one is no step with a checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "architecture.yaml").write_text(yaml.safe_dump(ARCHITECTURE))
    return BaseConfig(
        architecture=str(folder / "architecture.yaml"), output_dir=str(folder / "run"), vocab_merges=30, vae_steps=3,
        vae_batch_size=4, text_steps=3, text_batch_size=4, num_train_steps=3, train_batch_size=4, learning_rate=1e-3,
        checkpointing_steps=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(images, config) -> Path:
    """The folder of a finished training."""
    assert count_steps(images, config) == 9
    return Path(config.output_dir)


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def assert_same_weights(first: Path, second: Path) -> None:
    for part in ("unet", "text_encoder", "vae"):
        torch.testing.assert_close(weights(first, part), weights(second, part), rtol=0, atol=0)


@pytest.mark.slow
def test_stock_diffusers_loads_and_draws_with_the_result(base):
    pipeline = StableDiffusionPipeline.from_pretrained(base / "pipeline")
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red square", ""], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
    assert images.std() > 0


@pytest.mark.slow
def test_the_text_encoder_is_frozen_while_the_unet_is_trained(base, config):
    saved, before = (weights(base / folder, "text_encoder") for folder in ("pipeline", "parts"))
    torch.testing.assert_close(saved, before, rtol=0, atol=0)
    torch.manual_seed(derive_seed(config.seed, "unet"))
    untrained = UNet2DConditionModel(**ARCHITECTURE["unet"]).state_dict()
    changed = [name for name, value in weights(base / "pipeline", "unet").items() if not value.equal(untrained[name])]
    assert len(changed) > 0.8 * len(untrained)


@pytest.mark.slow
def test_latents_have_unit_variance(base):
    latents = load_file(base / "parts" / "latents.safetensors")["latents"]
    assert latents.shape == (12, 4, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    vae = json.loads((base / "pipeline" / "vae" / "config.json").read_text())
    assert vae["scaling_factor"] != pytest.approx(0.18215)  # diffusers' default


@pytest.mark.slow
def test_running_again_takes_no_step_and_changes_nothing(images, base, config, tmp_path):
    before = Path(shutil.copytree(base / "pipeline", tmp_path / "pipeline"))
    assert count_steps(images, config) == 0
    assert_same_weights(base / "pipeline", before)


FLOW = {name: part for name, part in ARCHITECTURE.items() if name != "unet"} | {
    "transformer": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4,
        "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 8, "out_channels": 4,
        "pooled_projection_dim": 16, "pos_embed_max_size": 4,
    },
    "scheduler": {"num_train_timesteps": 20},
}  # fmt: skip


@pytest.mark.slow
def test_a_small_stable_diffusion_3_is_trained_and_loaded_by_stock_diffusers(images, base, config, tmp_path):
    """Around an autoencoder and a text encoder that are there already."""
    shutil.copytree(base / "parts", tmp_path / "run" / "parts")
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump(FLOW))
    flow = replace(
        config, architecture=str(tmp_path / "flow.yaml"), output_dir=str(tmp_path / "run"), snr_gamma=None,
        density="logit_normal", pooled_dropout=0.5, tokens_dropout=0.2,
    )  # fmt: skip
    assert count_steps(images, flow) == 3
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["a red square"], num_inference_steps=2, output_type="pt").images.isfinite().all()
    # Tokens are what the text encoder's last layer says, before its last norm; T5's are zeros.
    text_encoder = CLIPTextModel.from_pretrained(tmp_path / "run" / "parts" / "text_encoder", dtype=torch.float32)
    ids = pipeline.tokenizer(["a red square"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(["a red square"], None, None)
        output = text_encoder(ids, output_hidden_states=True)
    own = output.hidden_states[-1]
    torch.testing.assert_close(tokens[:, :12], torch.cat([own, own], -1))
    torch.testing.assert_close(pooled, torch.cat([output.pooler_output] * 2, -1))
    assert tokens.shape[1] == 12 + 256 and not tokens[:, 12:].any()
    assert count_steps(images, flow) == 0


def test_of_some_captions_one_part_is_the_empty_one_s(images, config, tiny_tokenizer):
    family = get_family(make("sd3", tiny_tokenizer))
    batches = CaptionedLatents(torch.zeros(len(images), 4, 8, 8), images, tiny_tokenizer, 0)
    shares = {"train_batch_size": 64, "caption_dropout": 0.0}
    whole = family.text_parts(batches.encoded(family, 3, replace(config, **shares)))
    shares |= {"pooled_dropout": 0.3, "tokens_dropout": 0.2}
    found = family.text_parts(batches.encoded(family, 3, replace(config, **shares)))
    empty = family.text_parts(family.encode_prompts([""]))
    changed = {}
    for name, part in found.items():
        changed[name] = (part != whole[name]).flatten(1).any(1)
        torch.testing.assert_close(part[changed[name]], empty[name].expand_as(part)[changed[name]])
    assert not (changed["pooled"] & changed["tokens"]).any()
    assert 10 < changed["pooled"].sum() < 28 and 5 < changed["tokens"].sum() < 22


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        (FLOW, {}, "snr_gamma weights timesteps of diffusion; pass null"),
        (ARCHITECTURE, {"density": "logit_normal"}, "density is of a flow"),
        (ARCHITECTURE, {"pooled_dropout": 0.1}, "reads no pooled text"),
        (ARCHITECTURE, {"tokens_dropout": 0.1}, "reads no pooled text"),
    ],
)
def test_options_that_do_not_fit_what_is_trained_are_refused(images, config, tmp_path, architecture, changes, says):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(architecture))
    wrong = replace(config, architecture=str(tmp_path / "a.yaml"), output_dir=str(tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=says):
        train_base(images, wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_interrupted_and_run_again(images, base, config, tmp_path, monkeypatch):
    """Stopped when the text encoder was to be saved: the autoencoder is kept, and so is its own last step."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    elsewhere = replace(config, output_dir=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CLIPTextModel, "save_pretrained", interrupted)
        train_base(images, elsewhere)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"latents.safetensors", "vae"}
    assert count_steps(images, elsewhere) == 3
    assert_same_weights(tmp_path / "pipeline", base / "pipeline")
