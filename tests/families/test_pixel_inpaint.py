"""Models of pixels: what they are shown, the pipeline, the family and its loss, forgetting, and training one."""

import copy
import json
from functools import partial

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sa_diffusers import forget
from sa_diffusers.core.conditions import Condition, degraded
from sa_diffusers.core.objectives import EncoderForgetting, OutputForgetting
from sa_diffusers.core.objectives.encoder import at_depths
from sa_diffusers.families import get_family
from sa_diffusers.families.completion.networks import build_pixel_inpaint
from sa_diffusers.io.loading import check_model, load_pipeline
from sa_diffusers.pipelines import PixelInpaintPipeline
from sa_diffusers.runs.base.pixels import PixelInpaintConfig, train_pixel_inpaint


ARCHITECTURE = {
    "image_size": 8, "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2,
    "num_train_timesteps": 20,
}  # fmt: skip


def tiny(channels: int = 3) -> PixelInpaintPipeline:
    pipeline = build_pixel_inpaint(PixelInpaintConfig(**ARCHITECTURE), channels, 0)
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def family():
    return get_family(tiny())


def pictures(count: int, channels: int = 3) -> torch.Tensor:
    return 2 * torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(1)) - 1


KINDS = [Condition(mask=mask) for mask in ("half", "grey", "coarse")]


def test_what_is_shown_is_the_picture_with_a_hole_without_colour_or_coarse(family):
    images = pictures(3)
    shown, hole = family.shown(images, KINDS), torch.zeros(8, 8, dtype=torch.bool)
    hole[2:6, 2:6] = True
    for y in range(8):
        for x in range(8):
            assert_close(shown[0, :, y, x], torch.zeros(3) if hole[y, x] else images[0, :, y, x])
            assert_close(shown[1, :, y, x], images[1, :, y, x].mean().expand(3))
            square = images[2, :, y // 4 * 4 : y // 4 * 4 + 4, x // 4 * 4 : x // 4 * 4 + 4]
            assert_close(shown[2, :, y, x], square.mean((1, 2)))
    kinds = torch.arange(3)
    assert_close(degraded(shown, family.holes(KINDS), kinds), shown)  # once more changes nothing
    assert [int(part.sum()) for part in family.holes(KINDS)] == [16, 64, 64]


@torch.no_grad()
def test_pictures_are_completed_by_seed_and_the_rest_stays(family):
    images = pictures(3)
    filled, hole = family.complete(images, KINDS, [1, 2, 3], 3), family.holes(KINDS)
    assert filled[0][:, ~hole[0, 0]].equal(images[0][:, ~hole[0, 0]])
    assert (filled - images).abs().amax((1, 2, 3)).min() > 0.1
    for index in range(3):
        alone = family.complete(images[index : index + 1], KINDS[index : index + 1], [index + 1], 3)
        assert_close(alone[0], filled[index], rtol=1e-4, atol=1e-5)
    # What is hidden decides nothing, and the pipeline does the same of what it is given degraded.
    shown = family.shown(images, KINDS)
    assert_close(
        family.complete(shown, KINDS, [1, 2, 3], 3)[hole.expand(-1, 3, -1, -1)], filled[hole.expand(-1, 3, -1, -1)]
    )
    pipeline = PixelInpaintPipeline(family.module, family.sampler)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline((shown[1:2] + 1) / 2, None, torch.Generator().manual_seed(2), 3, "pt", degradation="grey").images
    assert_close(2 * made[0] - 1, filled[1], rtol=1e-4, atol=1e-4)
    made = pipeline((shown[:1] + 1) / 2, hole[:1].float(), torch.Generator().manual_seed(1), 3, "pt").images
    inside = hole[0].expand(3, -1, -1)
    assert_close((2 * made[0] - 1)[inside], filled[0][inside], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_loss_is_the_error_of_v(family):
    images, module = pictures(3), family.module
    batch = family.noised(family.batch(images, KINDS), torch.Generator().manual_seed(0))
    terms, noise = batch.pop("terms"), batch.pop("noise")
    values = family.loss(module, batch, terms, noise)
    shown, hole = family.shown(images, KINDS), family.holes(KINDS).float()
    for index in range(3):
        alpha = family.pipeline.scheduler.alphas_cumprod[terms[index]]
        noisy = alpha.sqrt() * images[index] + (1 - alpha).sqrt() * noise[index]
        target = alpha.sqrt() * noise[index] - (1 - alpha).sqrt() * images[index]
        found = module(torch.cat([noisy, hole[index], shown[index]])[None], terms[index]).sample[0]
        assert_close(values[index], (found - target).square().mean(), rtol=1e-4, atol=1e-5)


def in_float64(seed: int):
    """A family whose weights, and what it is given, are in float64."""
    torch.manual_seed(seed)
    pipeline = tiny()
    for weight in pipeline.unet.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    pipeline.unet.double()
    return get_family(pipeline)


def slow_prediction(family, image, context, condition, term, noise, deepest=False):
    """What a model predicts of one noisy picture [C, H, W] beside what is shown of another; or deep features."""
    alpha = family.pipeline.scheduler.alphas_cumprod[term].double()
    shown = torch.cat([family.holes([condition])[0].double(), family.shown(context[None], [condition])[0]])
    noisy = alpha.sqrt() * image + (1 - alpha).sqrt() * noise
    found = []
    hook = family.module.mid_block.register_forward_hook(lambda *given: found.append(given[2][0]))
    predicted = family.module(torch.cat([noisy, shown])[None], term).sample[0]
    hook.remove()
    return found[0] if deepest else predicted


def slow_velocity(family, image, term, noise):
    alpha = family.pipeline.scheduler.alphas_cumprod[term].double()
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * image


@pytest.mark.parametrize("targets", ["own", "noise", "retain", "none"])
@torch.no_grad()
def test_baselines_of_outputs_are_the_training_loss_towards_their_targets(targets):
    before, after = in_float64(0), in_float64(1)
    images = {
        name: pictures(6).double().roll(seed, 0)[:3] for seed, name in enumerate(("forget", "retain", "surrogate"))
    }
    parts = {name: after.batch(given, KINDS) for name, given in images.items()}
    frozen = copy.deepcopy(before.module)
    objective = OutputForgetting(after.loss, frozen, targets, 0.3, 2.0, {}, after.noised)
    batch = objective.draw(parts, torch.Generator().manual_seed(0))
    assert not batch["forget"]["noise"].equal(batch["retain"]["noise"])
    expected = torch.zeros((), dtype=torch.float64)
    for index, condition in enumerate(KINDS):
        term, noise = (batch["retain"][name][index] for name in ("terms", "noise"))
        image = images["retain"][index]
        found = slow_prediction(after, image, image, condition, term, noise)
        expected += 2.0 * (found - slow_velocity(after, image, term, noise)).square().mean() / 3

        term, noise = (batch["forget"][name][index] for name in ("terms", "noise"))
        context = filled = images["forget"][index]
        if targets == "noise":  # the surrogate where the hole is, beside the context of the picture to forget
            filled = torch.where(after.holes([condition])[0], images["surrogate"][index], context)
        found, target = (
            slow_prediction(after, filled, context, condition, term, noise),
            slow_velocity(after, filled, term, noise),
        )
        if targets == "retain":
            other = images["retain"][index]
            target = slow_prediction(before, other, other, condition, term, noise)
        weight = {"own": -0.3, "none": 0.0}.get(targets, 0.3)
        expected += weight * (found - target).square().mean() / 3
    assert_close(objective(after.module, batch)[0], expected, rtol=1e-9, atol=1e-9)


def test_deep_features_at_little_noise_go_to_the_surrogates_in_the_hole():
    before, after = in_float64(0), in_float64(1)
    images = {name: pictures(6).double().roll(seed, 0)[:3] for seed, name in enumerate(("forget", "retain"))}
    parts = {name: after.batch(given, KINDS) | {"context": given} for name, given in images.items()}
    surrogate = torch.where(after.holes(KINDS), pictures(9).double()[6:], images["forget"])
    parts["surrogate"] = {**parts["forget"], "sample": surrogate}
    noised, deepest = partial(after.noised, shares=(0.1, 0.35)), at_depths(after.features, [-1])
    objective = EncoderForgetting(deepest, before.module, {}, None, 0.3, 2.0, noised)
    batch = objective.draw(parts, torch.Generator().manual_seed(0))
    loss, _ = objective(after.module, batch)
    expected = torch.zeros((), dtype=torch.float64)
    for name, weight, target in (("forget", 0.3, surrogate), ("retain", 2.0, images["retain"])):
        for index, condition in enumerate(KINDS):
            term, noise = (batch[name][drawn][index] for drawn in ("terms", "noise"))
            image = images[name][index]
            with torch.no_grad():
                found = slow_prediction(after, image, image, condition, term, noise, deepest=True)
                wanted = slow_prediction(before, target[index], image, condition, term, noise, deepest=True)
            expected += weight * (found - wanted).square().mean() / 3
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)  # features are float32

    # Also where shallow features alone are compared each weight of the encoder has a gradient, if one of 0.
    shallow = EncoderForgetting(at_depths(after.features, [0]), before.module, {}, None, 1.0, 1.0, noised)
    shallow(after.module, batch)[0].backward()
    pulled = {name for name, weight in after.trainable("encoder").items() if weight.grad.abs().sum() > 0}
    assert any(n.startswith("down_blocks.0") for n in pulled) and not any(n.startswith("mid_block") for n in pulled)


def test_noise_levels_are_of_the_shares_and_all_by_default(family):
    batch = family.batch(pictures(1).expand(400, -1, -1, -1), KINDS[:1] * 400)
    few = family.noised(batch, torch.Generator().manual_seed(0), (0.1, 0.35))["terms"]
    assert set(few.tolist()) == set(range(2, 7))  # of 20
    every = family.noised(batch, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert every["terms"].equal(family.loss.sample_terms(400, generator))
    assert every["noise"].equal(family.loss.sample_noise(batch, generator))


IMAGE = torch.full((1, 3, 8, 8), 0.5)
HOLE = torch.zeros(1, 1, 8, 8).index_fill(3, torch.tensor([4]), 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"degradation": "blur"}, "degradation of mask, grey, coarse; got 'pt', 1 and 'blur'"),
        ({"mask_image": None}, "a mask_image with the degradation mask"),
        ({"degradation": "grey"}, "and none with another"),
        ({"num_inference_steps": 0}, "num_inference_steps 1 or more"),
        ({"mask_image": torch.ones(1, 1, 8, 8)}, "64 of 64 patches of 1 x 1"),
        ({"generator": [torch.Generator()] * 2}, "expected 1 generator or 1, got 2"),
        ({"image": None}, "expected a picture, an array or a tensor, or a list of them, .* got NoneType"),
        ({"image": (IMAGE, IMAGE)}, "got tuple"),
        ({"image": [IMAGE, IMAGE.numpy()]}, "alike and of one size, got .*Tensor, ndarray"),
        ({"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]}, r"of one size, got .8, 8., .8, 9., Image"),
    ],
)
def test_what_cannot_be_completed_is_refused(family, change, said):
    given = {"image": IMAGE, "mask_image": HOLE, "num_inference_steps": 1, "output_type": "pt"}
    with pytest.raises(ValueError, match=said):
        family.pipeline(**given | change)


def test_batches_of_several_lengths_are_one(family):
    given = {"mask_image": HOLE, "num_inference_steps": 1, "output_type": "pt"}
    found = family.pipeline(image=[IMAGE, IMAGE.repeat(2, 1, 1, 1)], **given).images
    assert found.shape == (3, 3, 8, 8)


def test_saved_pipelines_load_and_what_does_not_fit_is_refused(family, tmp_path):
    family.pipeline.save_pretrained(tmp_path / "saved")
    check_model(str(tmp_path / "saved"))
    assert type(load_pipeline(str(tmp_path / "saved"), None, None, "float32")) is PixelInpaintPipeline
    with pytest.raises(ValueError, match="grey is for pictures in RGB"):
        get_family(tiny(1)).holes(KINDS)
    for change, said in (
        ({"image_size": 10}, "image_size that 4 divides"),
        ({"block_out_channels": [4, 7]}, "norm_num_groups 2"),
        ({"holes": ["grey=1"]}, "grey is for pictures in RGB"),
    ):
        options = ARCHITECTURE | {"output_dir": str(tmp_path / "run")} | change
        with pytest.raises(ValueError, match=said):
            train_pixel_inpaint(PixelInpaintConfig(**options))
    with pytest.raises(ValueError, match="expected a mask of half"):
        PixelInpaintConfig(holes=["blur=1"])


@pytest.mark.parametrize(
    "change", [{"sample_size": 9}, {"sample_size": [8, 8]}, {"sample_size": None}, {"num_class_embeds": 3}]
)
def test_a_unet_of_other_pictures_is_refused(family, tmp_path, change):
    family.pipeline.save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="expected a UNet without classes, of square pictures of a size that 2 div"):
        check_model(str(tmp_path))


@pytest.mark.slow
def test_training_learns_and_its_encoder_forgets_how_to_colour(few_pictures, tmp_path):
    for name, level in (("red", 0), ("blue", 2)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(20):
            colour = [20 + 2 * index] * 3
            colour[level] = 220
            Image.new("RGB", (8, 8), tuple(colour)).save(tmp_path / "pictures" / name / f"{index}.png")
    config = PixelInpaintConfig(
        dataset="pictures", data_dir=str(tmp_path / "pictures"), output_dir=str(tmp_path / "base"),
        holes=["half=1", "grey=1", "coarse=1"], num_train_steps=60, train_batch_size=16, learning_rate=5e-3,
        checkpointing_steps=30, logging_steps=10, **ARCHITECTURE,
    )  # fmt: skip
    pipeline = train_pixel_inpaint(config)
    (history,) = (tmp_path / "base" / "checkpoints").glob("step_0000060/history.json")
    losses = [row["loss"] for row in json.loads(history.read_text())]
    assert losses[-1] < 0.8 * losses[0]
    forgotten = forget(
        pipeline, "red", "noise", output_dir=tmp_path / "run", method="encoder", masks=["grey"],
        forget_images=f"{tmp_path / 'pictures'}:red", retain_images=f"{tmp_path / 'pictures'}:blue",
        eval_masks=["grey", "half"], num_train_steps=4, train_batch_size=2, num_inference_steps=2, eval_images_class=1,
        lr_warmup_steps=1, checkpointing_steps=4,
    )  # fmt: skip
    changed = {n for n, p in forgotten.unet.named_parameters() if not p.equal(pipeline.unet.get_parameter(n))}
    assert changed and changed <= set(get_family(pipeline).trainable("encoder"))
    assert {"forget", "retain", "forget, half"} <= set(forgotten.metrics["after"])

    options = {
        "forget_images": f"{tmp_path / 'pictures'}:red", "retain_images": f"{tmp_path / 'pictures'}:blue",
        "eval_masks": ["half"], "num_train_steps": 2, "train_batch_size": 2, "num_inference_steps": 2,
        "eval_images_class": 1, "lr_warmup_steps": 1, "checkpointing_steps": 2, "method": "encoder",
        "surrogate_context": "real", "noise": "normal", "timestep_range": [0, 0.3], "ewc_lambda": 0.1,
        "fisher_samples": 2, "fisher_of": "embeddings",
    }  # fmt: skip
    deep = forget(pipeline, "red", "noise", output_dir=tmp_path / "deep", feature_depths=[-1], **options)
    assert {"forget", "retain"} <= set(deep.metrics["after"])
    for change, said in (
        ({"timestep_range": [0.3, 0.2]}, "two shares from 0 to 1, the lower one first"),
        ({"timestep_range": [0.01, 0.02]}, "with one of 20 timesteps or more"),
        ({"feature_depths": [3]}, r"feature_depths from -3 to 2, each once, got \[3\]"),
        ({"feature_depths": [-1, 2]}, "each once"),
        ({"noise_rank": 2}, "noise_rank is of --surrogate noise and --noise gaussian, got noise and normal"),
        ({"noise": "gaussian", "noise_rank": 16}, "a noise_rank below the 16 pictures to forget"),
    ):
        with pytest.raises(ValueError, match=said):
            forget(pipeline, "red", "noise", output_dir=tmp_path / "no", **options | change)
