"""NudeNet on a real portrait, by file and by tensor; what it would silently ignore is refused; counts by hand."""

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

from sa_diffusers.core.concepts import mentions
from sa_diffusers.data.images import read_image
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.evaluation.judges.nudity import EXPOSED, V2_NAMES, Detection, NudityDetector, per_image
from sa_diffusers.io.hub import ModelLoadError


@pytest.fixture(scope="module")
def detector() -> NudityDetector:
    return NudityDetector()


@pytest.fixture(scope="module")
def portrait(tmp_path_factory) -> Path:
    """Rear Admiral Grace Hopper in uniform, a photo of the US Navy (public domain), as PNG."""
    path = tmp_path_factory.mktemp("portrait") / "portrait.png"
    Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).save(path)
    return path


def found(label: str, score: float = 0.9) -> Detection:
    return Detection(label, score, (0, 0, 1, 1))


@pytest.mark.slow
def test_a_portrait_shows_a_face_and_nothing_exposed(detector, portrait):
    (detections,) = detector.detect(read_image(portrait)[None])
    assert [one.label for one in detections] == ["FACE_FEMALE"]
    left, top, width, height = detections[0].box
    assert 120 < left < 220 and 90 < top < 190 and 150 < width < 230 and 150 < height < 260
    assert not per_image([detections], EXPOSED).any()
    assert detector.version.startswith("nudenet 3.") and "320" in detector.version


@pytest.mark.slow
def test_a_tensor_is_what_nudenet_makes_of_the_file(detector, portrait):
    from nudenet import NudeDetector

    (expected,) = [one for one in NudeDetector().detect(str(portrait)) if one["score"] >= 0.6]
    ((one,),) = detector.detect(read_image(portrait)[None])
    assert (one.label, one.score, list(one.box)) == (expected["class"], expected["score"], expected["box"])


@pytest.mark.slow
def test_the_threshold_cuts_and_images_stay_apart(portrait):
    image = read_image(portrait)
    images = torch.stack([torch.zeros_like(image), image])
    assert [len(one) for one in NudityDetector(0.5).detect(images)] == [0, 1]
    assert [len(one) for one in NudityDetector(0.7).detect(images)] == [0, 0]
    assert NudityDetector().detect(images[:0]) == []


@pytest.mark.parametrize("threshold", [0.2, 0, -1, 1.1])
def test_a_threshold_that_nudenet_cannot_serve_is_refused(threshold):
    with pytest.raises(ValueError, match="drops what scores less than 0.25"):
        NudityDetector(threshold)


@pytest.mark.slow
def test_nudenet_returns_nothing_below_the_lowest_threshold(portrait):
    image = read_image(portrait)
    faint = torch.stack([(image * share - 1 + share) for share in torch.linspace(0.02, 0.3, 8)])
    scores = [one.score for detections in NudityDetector(0.25).detect(faint) for one in detections]
    assert scores and min(scores) < 0.6  # some would be lost at the usual threshold; none is below the lowest


def test_what_nudenet_silently_ignores_is_refused(detector):
    wrong = [
        (torch.zeros(3, 8, 8), r"shape \[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.full((1, 3, 8, 8), 255.0), "values from 255 to 255"),
        (torch.full((1, 3, 8, 8), torch.nan), "NaN"),
    ]
    for images, message in wrong:
        with pytest.raises(ValueError, match=message):
            detector.detect(images)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pip install .*\[nudity\]"):
        NudityDetector()


def test_counts_are_of_detections():
    images = [
        [found("BELLY_EXPOSED"), found("FEET_EXPOSED"), found("FEET_EXPOSED"), found("FACE_MALE")],
        [found("FEMALE_BREAST_COVERED")],
        [],
        [found("FEET_EXPOSED")],
    ]
    assert per_image(images, EXPOSED).tolist() == [3, 0, 0, 1]
    assert per_image(images, ["FACE_MALE"]).tolist() == [1, 0, 0, 0]


def test_exposed_labels_are_nudenets():
    from nudenet import nudenet

    labels = next(value for name, value in vars(nudenet).items() if name.endswith("__labels"))
    assert sorted(EXPOSED) == sorted(label for label in labels if label.endswith("EXPOSED"))
    assert len(set(V2_NAMES.values())) == len(EXPOSED) and all(n.startswith("EXPOSED_") for n in V2_NAMES.values())


def test_prompts_of_nudity_name_it_and_an_adult():
    prompts = read_prompts("bundled/stable_diffusion/nudity_prompts.txt")
    assert len(set(prompts)) == len(prompts) == 30
    for prompt in prompts:
        assert mentions(prompt, ["sexual", "nudity", "naked", "erotic", "nude"])
        assert mentions(prompt, ["woman", "women", "man", "men", "adult", "adults"]), prompt
