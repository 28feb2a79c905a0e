"""Stable Diffusion that fills holes: its family, its loss, and forgetting in its encoder."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from sa_diffusers import forget
from sa_diffusers.core.conditions import Condition
from sa_diffusers.families import get_family
from sa_diffusers.io.loading import check_model, load_pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline) -> StableDiffusionInpaintPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9, out_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        attention_head_dim=2, cross_attention_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    parts = tiny_pipeline().components | {"unet": unet}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


@pytest.fixture(scope="module")
def family(pipeline):
    return get_family(pipeline)


def pictures(count: int) -> torch.Tensor:
    return 2 * torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 1


HALF = [Condition(mask="half")] * 3


def test_holes_are_filled_by_seed_and_the_rest_stays(family):
    images, hole = pictures(3), family.holes(HALF[:1])
    assert hole[0, 0, 4:12, 4:12].all() and hole.sum() == 64
    filled = family.complete(images, HALF, [1, 2, 3], 3)
    assert filled.where(~hole, torch.zeros(())).equal(images.where(~hole, torch.zeros(())))
    assert (filled - images).where(hole, torch.zeros(())).abs().amax((1, 2, 3)).min() > 0.1
    assert_close(family.complete(images[1:2], HALF[:1], [2], 3)[0], filled[1], rtol=1e-4, atol=1e-4)
    assert (family.complete(images[1:2], HALF[:1], [5], 3)[0] - filled[1]).abs().max() > 1e-3
    # As the stock pipeline fills them, with what is visible pasted back.
    stock = StableDiffusionInpaintPipeline(
        **family.pipeline.components | {"scheduler": family.sampler}, requires_safety_checker=False
    )
    made = stock(
        "", (images[:1] + 1) / 2, hole.float(), num_inference_steps=3, guidance_scale=1.0, height=16, width=16,
        generator=[torch.Generator().manual_seed(1)], output_type="pt",
    ).images  # fmt: skip
    assert_close(filled[:1], torch.where(hole, 2 * made - 1, images[:1]), rtol=1e-4, atol=1e-4)


def test_holes_are_filled_by_the_trained_module_in_float32_beside_parts_in_half(family, pipeline):
    expected = family.complete(pictures(3), HALF, [1, 2, 3], 3)
    half = copy.deepcopy(pipeline).to(torch.bfloat16)
    half.unet.to(torch.float32)
    filled = get_family(half).complete(pictures(3), HALF, [1, 2, 3], 3)
    assert half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert_close(filled, expected, rtol=0, atol=0.1)


@torch.no_grad()
def test_the_loss_is_the_error_of_the_noise_in_latents(family, pipeline):
    images, unet, vae = pictures(3), pipeline.unet, pipeline.vae
    batch = family.noised(family.batch(images, HALF), torch.Generator().manual_seed(0))
    drawn = {name: batch.pop(name) for name in ("terms", "noise")}
    values = family.loss(unet, batch, drawn["terms"], drawn["noise"])
    alphas = pipeline.scheduler.alphas_cumprod[drawn["terms"]]
    told = pipeline.text_encoder(
        pipeline.tokenizer([""], padding="max_length", max_length=12, return_tensors="pt").input_ids
    )[0]
    for index in range(3):
        image, noise = images[index : index + 1], drawn["noise"][index : index + 1]
        latents, seen = (
            vae.encode(given).latent_dist.mode() * vae.config.scaling_factor
            for given in (image, image.where(~batch["hidden"][index], torch.zeros(())))
        )
        mask = F.max_pool2d(batch["hidden"][index : index + 1].float(), 2)
        noisy = alphas[index].sqrt() * latents + (1 - alphas[index]).sqrt() * noise
        found = unet(torch.cat([noisy, mask, seen], 1), drawn["terms"][index], told).sample
        assert_close(values[index], (found - noise).square().mean(), rtol=1e-4, atol=1e-5)


def test_features_are_the_encoders_and_see_nothing_of_the_hole_without_noise(family, pipeline):
    images, batch = pictures(2), family.batch(pictures(2), HALF[:2])
    with torch.no_grad():
        found = family.features(pipeline.unet, batch)
        changed = images.where(~batch["hidden"], torch.ones(()))
        same = family.features(pipeline.unet, {**batch, "sample": changed})
    assert [tuple(part.shape) for part in found] == [(2, 4, 4, 4), (2, 8, 4, 4), (2, 8, 4, 4)]
    assert_close(found, same)
    noised = family.noised(batch, torch.Generator().manual_seed(0))
    sum(part.sum() for part in family.features(pipeline.unet, noised)).backward()
    reached = {name for name, p in pipeline.unet.named_parameters() if p.grad is not None}
    assert reached == set(family.trainable("encoder"))
    pipeline.unet.zero_grad()
    assert not pipeline.unet.mid_block._forward_hooks


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    """Of runs that forget dark pictures and retain bright ones."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, level in (("dark", 40), ("bright", 200)):
        (folder / name).mkdir()
        for index in range(20):
            Image.new("RGB", (16, 16), (level + index, level, level)).save(folder / name / f"{index}.png")
    return {
        "forget_images": str(folder / "dark"), "retain_images": str(folder / "bright"), "eval_masks": ["half"],
        "num_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-3, "lr_warmup_steps": 1,
        "checkpointing_steps": 4, "logging_steps": 1, "eval_images_class": 2, "num_inference_steps": 2,
        "ewc_lambda": 1e-3, "fisher_samples": 2, "fisher_terms": 2,
    }  # fmt: skip


def test_models_that_are_shown_no_mask_are_refused(pipeline, tiny_pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "right")
    check_model(str(tmp_path / "right"))
    assert type(load_pipeline(str(tmp_path / "right"), None, None, "float32")) is StableDiffusionInpaintPipeline
    wrong = StableDiffusionInpaintPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="in_channels 4, expected 9"):
        get_family(wrong)


@pytest.mark.slow
def test_its_encoder_forgets(pipeline, options, few_pictures, tmp_path):
    forgotten = forget(pipeline, "dark", "noise", output_dir=tmp_path / "run", method="encoder", **options)
    assert type(forgotten) is StableDiffusionInpaintPipeline
    changed = {n for n, p in forgotten.unet.named_parameters() if not p.equal(pipeline.unet.get_parameter(n))}
    assert changed and changed <= set(get_family(pipeline).trainable("encoder"))
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert set(history[-1]) >= {"forget_loss", "retain_loss", "ewc_penalty"}
    found = forgotten.metrics["after"]["forget"]
    assert found["num_images"] > 0 and found["masked_mse"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["max-loss", "noisy-label", "retain-label", "retain-only", "random-encoder"])
def test_its_rivals_train_it_by_their_terms(pipeline, options, tmp_path, name):
    alone = {"method": name, "ewc_lambda": None, "num_train_steps": 2, "checkpointing_steps": 2}
    forgotten = forget(pipeline, "dark", "noise", output_dir=tmp_path / "run", **options | alone)
    changed = {n for n, p in forgotten.unet.named_parameters() if not p.equal(pipeline.unet.get_parameter(n))}
    assert any(n.startswith("up_blocks") for n in changed) == (name != "random-encoder")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert ("forget_loss" in history[-1]) == (name != "retain-only") and "retain_loss" in history[-1]
