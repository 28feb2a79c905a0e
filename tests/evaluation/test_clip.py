"""CLIP as a judge, at tiny size: embeddings against transformers' own, numbers against loops in float64."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import save_tiny_clip
from torch.testing import assert_close
from transformers import BertConfig

from sa_diffusers.evaluation.judges.clip import Clip, clip_score, perceptual_change, zero_shot
from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.report.pictures import to_uint8


PROMPTS = ["a red seven", "a green nine on black", "two"]


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"), tiny_tokenizer)


@pytest.fixture(scope="module")
def clip(folder) -> Clip:
    return Clip.load(str(folder))


def random_images(count: int, size: int = 16) -> torch.Tensor:
    """Of 256 levels, so that rounding them changes nothing."""
    return torch.randint(0, 256, (count, 3, size, size)) / 127.5 - 1


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(v * v for v in vector))
    return [v / length for v in vector]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def pixels_of(clip: Clip, images: torch.Tensor) -> torch.Tensor:
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (clip.processor.image_mean, clip.processor.image_std)
    )
    return ((images + 1) / 2 - mean) / std


@torch.no_grad()
def test_embeddings_are_those_of_transformers(clip, tiny_tokenizer):
    images = random_images(35)  # two batches
    features = clip.model.get_image_features(pixel_values=pixels_of(clip, images)).pooler_output
    embedded = clip.embed_images(images)
    assert_close(embedded, features / features.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert_close(embedded[30:], clip.embed_images(images[30:]), atol=1e-6, rtol=1e-5)
    for prompt, row in zip(PROMPTS, clip.embed_texts(PROMPTS), strict=True):
        tokens = tiny_tokenizer([prompt], return_tensors="pt")  # alone, without padding
        features = clip.model.get_text_features(**tokens).pooler_output[0]
        assert_close(row, features / features.norm(), atol=1e-5, rtol=1e-5)


def test_texts_are_told_apart_and_long_ones_cut(clip):
    texts = clip.embed_texts([*PROMPTS, "a red green blue " * 30, "a red green blue " * 40])
    assert (texts @ texts.T)[:4, :4].fill_diagonal_(0).max() < 0.999
    assert_close(texts[3], texts[4])
    assert clip.embed_texts([]).shape == (0, 6) and clip.embed_images(torch.zeros(0, 3, 16, 16)).shape == (0, 6)


@torch.no_grad()
def test_images_of_another_size_are_scaled_and_cropped(clip):
    image = random_images(1, 48)[..., :32, :]  # 32 x 48
    picture = Image.fromarray(to_uint8(image[0]).permute(1, 2, 0).numpy()).resize((24, 16), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture.crop((4, 0, 20, 16)))).permute(2, 0, 1)[None] / 127.5 - 1
    features = clip.model.get_image_features(pixel_values=pixels_of(clip, pixels)).pooler_output
    assert_close(clip.embed_images(image), features / features.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_clip_score_is_the_cosine(clip):
    images = random_images(3)
    image_rows, text_rows = clip.embed_images(images).double().tolist(), clip.embed_texts(PROMPTS).double().tolist()
    expected = [100 * max(0.0, dot(a, b)) for a, b in zip(image_rows, text_rows, strict=True)]
    assert_close(clip_score(clip, images, PROMPTS).double(), torch.tensor(expected).double(), atol=1e-4, rtol=1e-5)


def test_score_is_100_where_image_and_text_agree_and_0_where_they_oppose(clip, monkeypatch):
    texts = clip.embed_texts(PROMPTS)
    monkeypatch.setattr(clip, "embed_images", lambda images: texts * torch.tensor([[1.0], [-1.0], [1.0]]))
    assert_close(clip_score(clip, random_images(3), PROMPTS), torch.tensor([100.0, 0.0, 100.0]))
    named = clip.embed_texts([f"a photo of {prompt}" for prompt in PROMPTS])
    monkeypatch.setattr(clip, "embed_images", lambda images: named * torch.tensor([[1.0], [-1.0], [1.0]]))
    chances = zero_shot(clip, random_images(3), PROMPTS)
    assert chances.argmax(1).tolist()[::2] == [0, 2] and chances[1].argmin() == 1


def test_zero_shot_is_the_softmax_of_scaled_cosines(clip):
    images, names = random_images(4), ["seven", "nine", "two"]
    texts = clip.embed_texts([f"a photo of {name}" for name in names]).double().tolist()
    scale, rows = math.exp(clip.model.logit_scale.item()), []
    for image in clip.embed_images(images).double().tolist():
        weights = [math.exp(scale * dot(image, text)) for text in texts]
        rows.append([weight / math.fsum(weights) for weight in weights])
    chances = zero_shot(clip, images, names)
    assert_close(chances.double(), torch.tensor(rows).double(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_perceptual_change_equals_a_loop(clip):
    before, after = random_images(5), random_images(5)
    states = [clip.hidden(images) for images in (before, after)]
    assert len(states[0]) == 3 and states[0][0].shape == (5, 5, 8)
    output = clip.model.vision_model(pixel_values=pixels_of(clip, before))
    assert_close(states[0][-1], output.last_hidden_state, atol=1e-5, rtol=1e-5)
    expected = []
    for image in range(5):
        layers = []
        for a, b in zip(*states, strict=True):
            tokens = [
                math.fsum((x - y) ** 2 for x, y in zip(unit(p), unit(q), strict=True))
                for p, q in zip(a[image].double().tolist(), b[image].double().tolist(), strict=True)
            ]
            layers.append(math.fsum(tokens) / len(tokens))
        expected.append(math.fsum(layers) / len(layers))
    change = perceptual_change(clip, before, after, batch_size=2)
    assert_close(change.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)


def test_equal_pictures_have_not_changed_and_more_noise_changes_more(clip):
    images = random_images(6) * 0.5
    assert perceptual_change(clip, images, images.clone()).tolist() == [0] * 6
    noise = torch.randn_like(images)
    means = [perceptual_change(clip, images, (images + s * noise).clamp(-1, 1)).mean() for s in (0.02, 0.1, 0.4)]
    assert 0 < means[0] < means[1] < means[2] <= 4
    assert perceptual_change(clip, images[:0], images[:0]).shape == (0,)


def test_wrong_input_is_refused(clip):
    images = random_images(2)
    with pytest.raises(ValueError, match="a prompt for each of 2 images, got 3"):
        clip_score(clip, images, PROMPTS)
    for names in (["one"], ["one", "one"]):
        with pytest.raises(ValueError, match="two names or more"):
            zero_shot(clip, images, names)
    with pytest.raises(ValueError, match="pairs of one shape"):
        perceptual_change(clip, images, images[:1])
    for judge in (clip.embed_images, clip.hidden):
        with pytest.raises(ValueError, match="values from 255 to 255"):
            judge(torch.full((1, 3, 16, 16), 255.0))


def test_what_cannot_be_loaded_says_why(folder, tmp_path):
    with pytest.raises(ModelLoadError, match="neither a local folder nor a model"):
        Clip.load(str(tmp_path / "none"))
    with pytest.raises(ModelLoadError, match="hub cannot be reached"):
        Clip.load("openai/clip-vit-base-patch32")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelLoadError, match="of the type bert"):
        Clip.load(str(tmp_path / "bert"))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelLoadError, match="tokenizer of .* tokens for a model of"):
        Clip.load(str(tmp_path))


def test_weights_that_are_missing_are_not_drawn_at_random(clip, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = clip.model.state_dict()
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lacks weights of CLIP, such as visual_projection"):
        Clip.load(str(tmp_path))
