"""The world of coloured digits: captions, what they name, strokes and colours."""

import itertools
import random
import re

import numpy as np
import pytest
import torch

from sa_diffusers.data.digits import captions as grammar
from sa_diffusers.data.digits.captions import ATTRIBUTES, WORDS, caption, fill, held_out_templates
from sa_diffusers.data.digits.images import BACKGROUND_RGB, HALF_WIDTH, INK_RGB, ColoredDigits, colorize, redraw
from studies.base_quality import compose_prompt, composed_prompts, diversity_reference, held_out_prompts


ATTRIBUTE_OF_WORD = {
    word: (attribute, name)
    for attribute, classes in WORDS.items()
    for name, words in classes.items()
    for word in words
}
HELD_OUT_VERBS = """sketch scribbling scribble scrawled scrawl carved carve jot inked visualize generate doodle imagine
    produce penned illustrate etch typed type depict stamp copy display spray engrave compose find""".split()


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def named_in(text: str) -> dict[str, str]:
    """The class of each attribute that a text names; fails if it names one twice."""
    found = [ATTRIBUTE_OF_WORD[word] for word in words_of(text) if word in ATTRIBUTE_OF_WORD]
    assert len(dict(found)) == len(found), text
    return dict(found)


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def test_no_word_names_two_classes():
    assert len(ATTRIBUTE_OF_WORD) == sum(len(words) for classes in WORDS.values() for words in classes.values())


def test_grammar_produces_no_held_out_frame():
    frames = {template: words_of(re.sub(r"{\w+}", " ", template)) for template in held_out_templates()}
    assert len(frames) >= 30
    for index in range(5000):
        rng = random.Random(index)
        words = words_of(caption(grammar.random_attributes(rng), rng))
        for template, frame in frames.items():
            assert not is_subsequence(frame, words), (template, words)


def test_grammar_uses_no_held_out_verb(monkeypatch):
    # Made-up words are left out: any short word may come up among them, out of context.
    monkeypatch.setattr(grammar, "_insert_pseudo_words", lambda text, rng: text)
    vocabulary = set()
    for index in range(20_000):
        rng = random.Random(index)
        vocabulary.update(words_of(caption(grammar.random_attributes(rng), rng)))
    assert len(vocabulary) > 100
    assert not vocabulary & set(HELD_OUT_VERBS)


@pytest.mark.parametrize(
    "attributes", [set(part) for size in range(5) for part in itertools.combinations(ATTRIBUTES, size)]
)
def test_caption_names_what_it_is_given_and_nothing_else(attributes, monkeypatch):
    monkeypatch.setattr(grammar, "_insert_pseudo_words", lambda text, rng: text)  # which may spell a class's name
    for index in range(200):
        rng = random.Random(index)
        given = {name: value for name, value in grammar.random_attributes(rng).items() if name in attributes}
        assert named_in(caption(given, rng, keep=1.0)) == given


def test_caption_leaves_attributes_out_at_random():
    prompts = [caption({"digit": "seven"}, random.Random(index), keep=0.75) for index in range(1000)]
    assert 0.7 < sum(bool(named_in(prompt)) for prompt in prompts) / 1000 < 0.8


def test_captions_are_many_and_repeatable():
    attributes = {"digit": "seven", "ink": "red", "background": "gray", "stroke": "thin"}
    captions = [caption(attributes, random.Random(index)) for index in range(500)]
    assert captions == [caption(attributes, random.Random(index)) for index in range(500)]
    assert len(set(captions)) > 400
    for word in ("seven", "7", "gray", "grey", "thin", "fine"):
        assert any(word in words_of(text) for text in captions), word


def test_filled_templates_name_their_slots():
    attributes = {"digit": "seven", "ink": "red", "background": "gray", "stroke": "thin"}
    for template in held_out_templates():
        slots = set(re.findall(r"{(\w+)}", template))
        assert "digit" in slots
        assert named_in(fill(template, attributes, random.Random(0))) == {name: attributes[name] for name in slots}


def test_prompts_of_the_evaluation_know_what_they_name():
    prompts = composed_prompts(300, seed=0)
    held_out = held_out_prompts(2 * len(held_out_templates()), seed=0)
    assert {prompt.template for prompt in held_out} == set(held_out_templates())
    for prompt in prompts + held_out:
        assert named_in(prompt.text) == prompt.named
    assert {len(prompt.named) for prompt in prompts} == {0, 1, 2, 3, 4}
    full = {"digit": "two", "ink": "blue", "background": "white", "stroke": "bold"}
    assert compose_prompt(full, random.Random(0), keep=1.0).named == full


def bar(width: int) -> np.ndarray:
    image = np.zeros((28, 28), np.uint8)
    image[6:22, 14 - width // 2 : 14 + (width + 1) // 2] = 255
    return image


def ink_per_row(coverage: np.ndarray) -> float:
    """Mean ink of a row in the middle of a vertical bar, in pixels."""
    return coverage[12:20].sum(1).mean() / 255


@pytest.mark.parametrize("half_width", [0.6, 0.9, 1.6, 2.1])
def test_redraw_gives_every_line_the_same_stroke(half_width):
    pytest.importorskip("skimage")
    for width in (2, 4, 6):  # of the line in the original
        redrawn = redraw(bar(width), half_width)
        assert redrawn.shape == (32, 32)
        assert ink_per_row(redrawn) == pytest.approx(2 * half_width, abs=0.3)


def test_thinnest_bold_stroke_is_thicker_than_boldest_thin_one():
    pytest.importorskip("skimage")
    thin, bold = redraw(bar(4), HALF_WIDTH["thin"][1]), redraw(bar(4), HALF_WIDTH["bold"][0])
    assert ink_per_row(thin) + 1 < ink_per_row(bold)
    assert (thin <= bold).all()


def nearest(colours: dict[str, tuple[float, float, float]], pixel: torch.Tensor) -> str:
    return min(colours, key=lambda name: (torch.tensor(colours[name]) - (pixel + 1) / 2).norm().item())


@pytest.mark.parametrize("ink", INK_RGB)
@pytest.mark.parametrize("background", BACKGROUND_RGB)
def test_colours(ink, background):
    coverage = torch.zeros(32, 32, dtype=torch.uint8)
    coverage[16] = 255
    for index in range(20):
        image = colorize(coverage, ink, background, random.Random(index))
        assert image.shape == (3, 32, 32)
        assert image.abs().max() <= 1
        assert nearest(INK_RGB, image[:, 16, 5]) == ink
        assert nearest(BACKGROUND_RGB, image[:, 0, 5]) == background


@pytest.fixture
def strokes() -> tuple[torch.Tensor, torch.Tensor]:
    coverage = torch.zeros(20, 2, 32, 32, dtype=torch.uint8)
    coverage[:, 0, 8:24, 15:17] = 255
    coverage[:, 1, 8:24, 14:18] = 255
    return coverage, torch.arange(20) % 10


def test_images_depend_on_seed_and_index_only(strokes):
    data, again = ColoredDigits(*strokes, copies=3, seed=1), ColoredDigits(*strokes, copies=3, seed=1)
    assert len(data) == 60
    for index in reversed(range(60)):
        assert data.attributes(index) == again.attributes(index)
        torch.testing.assert_close(data.image(index), again.image(index), rtol=0, atol=0)
    other = ColoredDigits(*strokes, copies=3, seed=2)
    assert any(data.attributes(index) != other.attributes(index) for index in range(60))


def test_images_show_their_attributes(strokes):
    data = ColoredDigits(*strokes, copies=3)
    for index in range(60):
        attributes, image = data.attributes(index), data.image(index)
        assert attributes["digit"] == ATTRIBUTES["digit"][index % 10]
        assert nearest(INK_RGB, image[:, 16, 16]) == attributes["ink"]
        outside = image[:, 16, 14]  # covered by a bold stroke only
        if attributes["stroke"] == "bold":
            assert nearest(INK_RGB, outside) == attributes["ink"]
        else:
            assert nearest(BACKGROUND_RGB, outside) == attributes["background"]


def test_diversity_reference_has_two_sets_without_a_digit_in_common(strokes):
    data = ColoredDigits(*strokes)
    reference = diversity_reference(data, 10, seed=0)
    assert reference.first.shape == reference.second.shape == (10, 3, 32, 32)
    both = torch.cat([reference.first, reference.second])
    assert len({image.numpy().tobytes() for image in both}) == 20  # the jitter of colours tells all images apart
    described = {data.image(index).numpy().tobytes(): data.attributes(index) for index in range(20)}
    for image, prompt in zip(reference.second, reference.prompts, strict=True):
        assert prompt.named == described[image.numpy().tobytes()]
    with pytest.raises(ValueError, match="at least 22 real images"):
        diversity_reference(data, 11, seed=0)


def test_digits_can_be_left_out():
    coverage, label = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 2, 32, 32), torch.arange(6) % 3
    data = ColoredDigits(coverage, label, copies=2, exclude=["one", "five"])
    assert len(data) == 8
    assert {data.attributes(index)["digit"] for index in range(8)} == {"zero", "two"}
    assert data.coverage[:, 0, 0, 0].tolist() == [0, 2, 3, 5]
    with pytest.raises(ValueError, match="expected classes to exclude of zero, .*, bold, got 7"):
        ColoredDigits(coverage, label, exclude=["7"])
    with pytest.raises(ValueError, match="none"):
        ColoredDigits(coverage, label, exclude=["zero", "one", "two"])
    with pytest.raises(ValueError, match="one class of each attribute .* got none"):
        ColoredDigits(coverage, label, exclude=["thin", "bold"])


def test_an_ink_and_a_stroke_can_be_left_out_and_the_digits_stay():
    coverage, label = torch.zeros(50, 2, 32, 32, dtype=torch.uint8), torch.arange(50) % 10
    data = ColoredDigits(coverage, label, exclude=["red", "bold"])
    drawn = [data.attributes(index) for index in range(50)]
    assert {one["ink"] for one in drawn} == set(INK_RGB) - {"red"} and {one["stroke"] for one in drawn} == {"thin"}
    assert [one["digit"] for one in drawn[:10]] == list(grammar.ATTRIBUTES["digit"])
    said = [data.caption(index, random.Random(index)).lower().split() for index in range(50)]
    assert not any(word in ("red", "bold", "thick") for words in said for word in words)
