"""Masked autoencoders: the pipeline, with and without this package, the family, its loss and its features."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_mae import tiny_mae
from torch.nn import functional as F
from torch.testing import assert_close

from sa_diffusers.core.conditions import MASKS, Condition, hidden_patches
from sa_diffusers.core.fisher import estimate_fisher
from sa_diffusers.families import get_family
from sa_diffusers.io.loading import check_model, load_pipeline, read_model_index
from sa_diffusers.pipelines import MaskedAutoencoderInpaintPipeline


@pytest.fixture(scope="module")
def pipeline():
    return tiny_mae()


@pytest.fixture(scope="module")
def family(pipeline):
    return get_family(pipeline)


def images(count: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def slow_prediction(mae, image: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What a float64 copy makes of one picture [C, H, W] in [-1, 1], patch by patch: [L, 4 C]."""
    mae, size = copy.deepcopy(mae).double(), 2
    visible = [index for index in range(16) if not hidden[index]]
    vit, decoder = mae.vit, mae.decoder
    weight, bias = (
        vit.embeddings.patch_embeddings.projection.weight.flatten(1),
        vit.embeddings.patch_embeddings.projection.bias,
    )
    positions = vit.embeddings.position_embeddings[0]
    rows = [vit.embeddings.cls_token[0, 0] + positions[0]]
    for index in visible:
        y, x = divmod(index, 4)
        patch = image.double()[:, y * size : (y + 1) * size, x * size : (x + 1) * size].flatten()
        rows.append(weight @ patch + bias + positions[1 + index])
    states = torch.stack(rows)[None]
    for layer in vit.layers:
        states = layer(states, None)
    tokens = decoder.decoder_embed(vit.layernorm(states))[0]
    full = [tokens[0]] + [decoder.mask_token[0, 0]] * 16
    for place, index in enumerate(visible):
        full[1 + index] = tokens[1 + place]
    states = (torch.stack(full) + decoder.decoder_pos_embed[0])[None]
    for layer in decoder.decoder_layers:
        states = layer(states, None)
    return decoder.decoder_pred(decoder.decoder_norm(states))[0, 1:]


@torch.no_grad()
def test_holes_are_filled_as_a_slow_model_fills_them_one_by_one_and_the_rest_stays(pipeline):
    given, masks = images(3), torch.zeros(3, 1, 8, 8)
    masks[0, :, 3, 3] = 1  # one pixel: its patch is filled
    masks[1, :, 2:6, 2:6] = 1
    masks[2, :, :, :5] = 0.7  # snaps outward to 6 columns
    filled = pipeline(given, masks, output_type="pt").images
    for index, patches in enumerate(
        ([5], [5, 6, 9, 10], [row * 4 + column for row in range(4) for column in range(3)])
    ):
        hidden = torch.zeros(16, dtype=torch.bool)
        hidden[patches] = True
        predicted, expected = (
            slow_prediction(pipeline.mae, 2 * given[index] - 1, hidden),
            given[index].clone().double(),
        )
        for patch in patches:
            y, x = divmod(patch, 4)
            pixels = (predicted[patch].view(2, 2, 1).permute(2, 0, 1).clamp(-1, 1) + 1) / 2
            expected[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = pixels
        assert_close(filled[index].double(), expected, rtol=1e-5, atol=1e-5)
    assert pipeline.mae.config.mask_ratio == 0.75  # as it was
    assert (filled - given).abs().max() > 0.01


def test_pictures_arrays_and_tensors_give_the_same(pipeline):
    pixels = (images(2) * 255).round()
    pictures = [Image.fromarray(image[0].to(torch.uint8).numpy()) for image in pixels]
    mask = Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), 2))
    drawn = pipeline(pictures, mask, torch.Generator(), 1)
    assert [picture.size for picture in drawn.images] == [(8, 8)] * 2 and drawn.images[0].mode == "L"
    tensor = pipeline(pixels / 255, torch.as_tensor(np.array(mask))[None, None] / 255, output_type="pt").images
    assert_close(
        torch.from_numpy(pipeline(pictures, [mask, mask], output_type="np").images), tensor.permute(0, 2, 3, 1)
    )
    assert isinstance(pipeline(pictures, mask, return_dict=False), tuple)


HOLE = torch.zeros(1, 1, 8, 8).index_fill(3, torch.tensor([4]), 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": images(1)[..., :6, :]}, "expected 8 x 8 pixels in 1 channels"),
        ({"image": Image.new("RGBA", (8, 8))}, "expected the mode L, got RGBA"),
        ({"image": Image.new("L", (9, 8))}, "expected 8 x 8 pixels"),
        ({"image": images(1) * 2 - 1}, r"expected values in \[0, 1\]"),
        ({"image": []}, "expected a picture or more"),
        ({"mask_image": torch.zeros(1, 1, 8, 8)}, "leave something to fill .* 0 of 16 patches"),
        ({"mask_image": HOLE.index_fill(3, torch.tensor([0, 2, 6]), 1.0)}, "16 of 16 patches"),
        ({"mask_image": HOLE.repeat(2, 1, 1, 1)}, "expected 1 mask or 1, got 2"),
        ({"num_inference_steps": 20}, "num_inference_steps 1"),
        ({"output_type": "latent"}, "expected output_type"),
    ],
)
def test_what_cannot_be_filled_is_refused(pipeline, change, said):
    with pytest.raises(ValueError, match=said):
        pipeline(**{"image": images(1), "mask_image": HOLE} | change)


def test_saved_pipelines_load_and_say_what_they_are(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    check_model(str(tmp_path))
    loaded = load_pipeline(str(tmp_path), None, None, "float32")
    assert type(loaded) is MaskedAutoencoderInpaintPipeline
    assert read_model_index(str(tmp_path))["_class_name"] == "MaskedAutoencoderInpaintPipeline"
    assert_close(loaded(images(1), HOLE, output_type="pt").images, pipeline(images(1), HOLE, output_type="pt").images)
    config = json.loads((tmp_path / "mae" / "config.json").read_text())
    (tmp_path / "mae" / "config.json").write_text(json.dumps(config | {"patch_size": 3}))
    with pytest.raises(ValueError, match="that its patches divide, got image_size 8 and patch_size 3"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_the_loss_is_the_error_in_the_holes(channels):
    pipeline = tiny_mae(channels)
    family, given = get_family(pipeline), 2 * images(3, channels) - 1
    batch = family.batch(given, [Condition(mask=f"random {seed}") for seed in range(3)])
    noise = family.loss.sample_noise(batch, torch.Generator())
    values = family.loss(pipeline.mae, batch, torch.zeros(3, dtype=torch.long), noise)
    for index in range(3):
        predicted = slow_prediction(pipeline.mae, given[index], batch["hidden"][index])
        errors = []
        for patch in batch["hidden"][index].nonzero()[:, 0].tolist():
            y, x = divmod(patch, 4)
            truth = given[index, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].permute(1, 2, 0).flatten().double()
            errors.append((predicted[patch] - truth).square().mean())
        assert_close(values[index].double(), torch.stack(errors).mean(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_features_are_the_encoders_of_what_is_visible(family, pipeline):
    given = 2 * images(2) - 1
    batch = family.batch(given, [Condition(mask="half")] * 2)
    (found,) = family.features(pipeline.mae, batch)
    assert found.shape == (2, 1 + 12, 16)
    hole = family.holes([Condition(mask="half")])
    assert hole.sum() == 16 and hole[0, 0, 2:6, 2:6].all()
    other = {**batch, "sample": torch.where(hole, -given, given)}
    assert_close(family.features(pipeline.mae, other)[0], found)  # nothing of the hole
    assert not family.features(pipeline.mae, {**batch, "sample": given.flip(2)})[0].allclose(found, atol=0.01)
    wrapped = torch.nn.Module()
    wrapped.module, wrapped.forward = pipeline.mae, pipeline.mae.forward  # as of several processes
    assert_close(family.features(wrapped, batch)[0], found)
    with pytest.raises(ValueError, match="hide equally many of 16 patches"):
        family.loss.forward(pipeline.mae, family.batch(given, [Condition(mask="half"), Condition(mask="ring")]))


def test_no_scope_trains_positions_and_a_fisher_can_be_estimated(family, pipeline):
    full, encoder = (set(family.trainable(scope)) for scope in ("full", "encoder"))
    assert encoder < full and all(name.startswith("vit.") for name in encoder) and "decoder.mask_token" in full
    rest = {name for name, _ in pipeline.mae.named_parameters()} - full
    assert rest == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    batch = family.batch(2 * images(1) - 1, [family.example])
    weights = family.trainable("full")
    sums = estimate_fisher(pipeline.mae, family.loss, weights, lambda index: batch, [0], terms=None)
    family.loss(pipeline.mae, batch, torch.zeros(1, dtype=torch.long), torch.zeros(1, 0)).sum().backward()
    expected = {name: weight.grad.square() for name, weight in weights.items()}
    assert_close(sums.square, expected)
    pipeline.mae.zero_grad()


def test_positions_of_a_new_model_differ_and_the_mask_token_is_not_zero(pipeline):
    for positions in (pipeline.mae.vit.embeddings.position_embeddings, pipeline.mae.decoder.decoder_pos_embed):
        assert F.pdist(positions[0, 1:]).min() > 0.1
    assert pipeline.mae.decoder.mask_token.abs().min() > 0


PICTURED = {
    "half": ["....", ".##.", ".##.", "...."],
    "ring": ["####", "#..#", "#..#", "####"],
    "top": ["####", "####", "....", "...."],
    "right": ["..##"] * 4,
}


def test_masks_hide_what_they_say():
    for name, rows in PICTURED.items():
        assert hidden_patches(name, 4).tolist() == [letter == "#" for letter in "".join(rows)], name
    assert hidden_patches("quarter", 8).nonzero()[:, 0].tolist() == [27, 28, 35, 36]
    assert hidden_patches("quarter", 4).equal(hidden_patches("half", 4))  # it snaps outward
    assert all(0 < hidden_patches(name, 8).sum() < 64 for name in MASKS)
    assert hidden_patches("random 3", 8).sum() == 32 and not hidden_patches("random 3", 8).equal(
        hidden_patches("random", 8)
    )
    assert hidden_patches("left 25", 8).nonzero()[:, 0].tolist() == [
        8 * row + column for row in range(8) for column in (0, 1)
    ]
    assert hidden_patches("bottom 30", 8).nonzero()[:, 0].tolist() == list(range(40, 64))  # 2.4 rows, snapped outward
    assert [int(hidden_patches(f"ring {side}", 8).sum()) for side in (25, 50, 75)] == [60, 48, 28]
    for wrong in ("left 0", "top 100", "ring 0", "ring 100"):
        with pytest.raises(ValueError, match="hides (0|64) of 8 x 8 patches"):
            hidden_patches(wrong, 8)
    for wrong in ("hole", "half 3", "random x"):
        with pytest.raises(ValueError, match="expected a mask of half"):
            hidden_patches(wrong, 8)
    with pytest.raises(ValueError, match="hides 4 of 2 x 2 patches"):
        hidden_patches("half", 2) if hidden_patches("half", 2).all() else hidden_patches("quarter", 2)


def test_conditions_of_other_models_are_refused(family):
    for wrong in (Condition("seven"), Condition(label=7), "half"):
        with pytest.raises(ValueError, match="expected conditions with a mask and no text"):
            family.batch(torch.zeros(1, 1, 8, 8), [wrong])
