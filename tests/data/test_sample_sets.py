"""Sample sets, folders of images, noise, and the endless walk over a data set."""

import json
import random
from collections import Counter

import pytest
import torch
from PIL import Image

from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.data.images import CaptionedImageFolder, image_paths, load_image
from sa_diffusers.data.sample_set import SampleSet, surrogate_from_images, uniform_noise
from sa_diffusers.families import get_family
from sa_diffusers.io.atomic_files import load_tensors, save_tensors
from sa_diffusers.training.loop import infinite_indices


@pytest.mark.parametrize(("num_samples", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_every_epoch_holds_each_index_once(num_samples, batch_size):
    walk = [i for step in range(3 * num_samples) for i in infinite_indices(num_samples, batch_size, step, seed=1)]
    epochs = [walk[start : start + num_samples] for start in range(0, len(walk), num_samples)]
    assert all(sorted(epoch) == list(range(num_samples)) for epoch in epochs)
    if num_samples > 3:
        assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_seed_and_step():
    expected = [infinite_indices(50, 8, step, seed=1) for step in range(20)]
    assert [infinite_indices(50, 8, step, seed=1) for step in reversed(range(20))][::-1] == expected
    assert infinite_indices(50, 8, 0, seed=2) != expected[0]


@pytest.fixture
def samples() -> SampleSet:
    prompts = ["a seven", "", "tête-à-tête", "a {}", "a, b"]
    return SampleSet(torch.randn(5, 4, 8, 8), list(map(Condition, prompts)))


@pytest.mark.parametrize("others", [{}, {1: Condition(label=0), 2: Condition("tête-à-tête", 7)}])
def test_sample_set_round_trip(samples, tmp_path, others):
    samples.conditions = [others.get(index, condition) for index, condition in enumerate(samples.conditions)]
    samples.save(tmp_path / "new" / "samples.safetensors")
    loaded = SampleSet.load(tmp_path / "new" / "samples.safetensors")
    assert loaded.conditions == samples.conditions
    torch.testing.assert_close(loaded.latents, samples.latents, rtol=0, atol=0)
    _, notes = load_tensors(tmp_path / "new" / "samples.safetensors")
    said = {"prompts": [condition.text for condition in samples.conditions]}
    assert notes == (said | {"labels": [None, 0, 7, None, None]} if others else said)


def test_sets_that_were_saved_with_prompts_alone_are_read(tmp_path):
    """As they lie on the hub."""
    save_tensors({"latents": torch.ones(2, 1, 2, 2, dtype=torch.float16)}, tmp_path / "old", prompts=["a six", ""])
    loaded = SampleSet.load(tmp_path / "old")
    assert loaded.conditions == [Condition("a six"), Condition()] and loaded.latents.dtype == torch.float32


def test_sample_set_take_and_add(samples):
    both = samples.take([3, 0]) + samples.take([]) + samples.take([1])
    assert texts(both.conditions) == ["a {}", "a seven", ""]
    torch.testing.assert_close(both.latents, samples.latents[[3, 0, 1]], rtol=0, atol=0)
    assert len(both) == 3


def test_batches_walk_over_the_whole_set(samples, tiny_pipeline):
    family = get_family(tiny_pipeline())
    batches = [samples.batch(family, 2, step, seed=0) for step in range(5)]
    drawn = torch.cat([batch["sample"] for batch in batches])
    counts = Counter(next(i for i in range(5) if row.equal(samples.latents[i])) for row in drawn)
    assert counts == dict.fromkeys(range(5), 2)
    index = next(i for i in range(5) if batches[0]["sample"][0].equal(samples.latents[i]))
    torch.testing.assert_close(
        batches[0]["encoder_hidden_states"][0],
        family.embed([samples.conditions[index].text])["encoder_hidden_states"][0],
        rtol=0,
        atol=0,
    )


def picture(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    image = Image.new("RGB", (width, height))
    image.putdata([(255 * x // (width - 1), 255 * y // (height - 1), 40) for y in range(height) for x in range(width)])
    return image


@pytest.mark.parametrize("size", [(16, 16), (64, 16), (16, 65), (33, 47), (7, 5)])
def test_load_image_crops_the_centre_and_does_not_stretch(size, tmp_path):
    picture(*size).save(tmp_path / "image.png")
    image = load_image(tmp_path / "image.png", 16)
    assert image.shape == (3, 16, 16)
    assert -1 <= image.min() and image.max() <= 1
    torch.testing.assert_close(image[2], torch.full((16, 16), 40 / 127.5 - 1))
    # What the crop keeps of the range: the whole short side, the same number of pixels of the long one.
    red, green = (image[c].max() - image[c].min() for c in (0, 1))
    short = min(size)
    for spread_, side in ((red, size[0]), (green, size[1])):
        assert spread_.item() == pytest.approx(2 * short / side, abs=2.5 * 2 / short)
    torch.testing.assert_close(image.mean(dim=(1, 2))[:2], torch.zeros(2), atol=0.15, rtol=0)


def test_load_image_keeps_values(tmp_path):
    image = Image.new("RGB", (2, 2))
    image.putdata([(0, 255, 128), (255, 0, 0), (0, 0, 255), (255, 255, 255)])
    image.save(tmp_path / "image.png")
    expected = torch.tensor([[[-1, 1], [-1, 1]], [[1, -1], [-1, 1]], [[128 / 127.5 - 1, -1], [1, 1]]])
    torch.testing.assert_close(load_image(tmp_path / "image.png", 2), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_images_are_refused(mode, tmp_path):
    Image.new(mode, (16, 16)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey\.png is a grey image \(mode"):
        load_image(tmp_path / "grey.png", 16)


@pytest.mark.parametrize("content", ["text", "truncated", "empty"])
def test_broken_images_are_named(content, tmp_path):
    random_pixels = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    random_pixels.save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(
        {"text": b"no image", "truncated": whole[: len(whole) // 2], "empty": b""}[content]
    )
    with pytest.raises(ValueError, match=r"broken\.png is no readable image .* repair or remove it"):
        load_image(tmp_path / "broken.png", 16)


def test_image_paths(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.webp"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_paths(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*empty; expected files ending in \.avif"):
        image_paths(tmp_path / "empty")


def test_captioned_image_folder(tmp_path):
    for index, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{index}.png")
    lines = [{"file_name": f"{i}.png", "text": f"all {c}"} for i, c in enumerate(("red", "blue"))]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = CaptionedImageFolder(str(tmp_path), 8)
    found = {data.caption(i, random.Random(0)): data.image(i) for i in range(len(data))}
    assert set(found) == {"all red", "all blue"}
    expected = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(found["all red"], expected)


def test_captioned_image_folder_without_captions(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"lacks the column text.*metadata\.jsonl"):
        CaptionedImageFolder(str(tmp_path), 8)


def test_uniform_noise(tiny_pipeline):
    family = get_family(tiny_pipeline())
    noise = uniform_noise(family, 40, seed=1)
    assert {image.shape for image in noise} == {(3, 16, 16)}
    values = torch.stack(noise).flatten()
    assert -1 <= values.min() and values.max() <= 1
    shares = values.histc(bins=8, min=-1, max=1) / len(values)
    torch.testing.assert_close(shares, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    torch.testing.assert_close(uniform_noise(family, 2, seed=1), noise[:2], rtol=0, atol=0)
    assert not uniform_noise(family, 1, seed=2)[0].equal(noise[0])


def test_surrogate_from_images(tiny_pipeline):
    family = get_family(tiny_pipeline())
    images = uniform_noise(family, 3, seed=1)
    samples = surrogate_from_images(family, images, ["a", "b", "c"], seed=2)
    assert texts(samples.conditions) == ["a", "b", "c"]
    again = surrogate_from_images(family, images[:1], ["a"], seed=2)
    torch.testing.assert_close(again.latents, samples.latents[:1], rtol=0, atol=0)
    vae = family.pipeline.vae
    posterior = vae.encode(torch.stack(images)).latent_dist
    scaled = (samples.latents / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert scaled.abs().max() < 6
    assert scaled.std().item() == pytest.approx(1.0, abs=0.15)
