"""Faces and whose they are: a real portrait under a real detector, numbers by hand, a tiny CLIP."""

import json

import pytest
import torch
from matplotlib.cbook import get_sample_data
from tiny_clip import save_tiny_clip
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from sa_diffusers.data.images import read_image
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.evaluation.intervals import bootstrap_interval
from sa_diffusers.evaluation.judges.clip import Clip, zero_shot
from sa_diffusers.evaluation.judges.faces import CELEBRITIES, ClipIdentity, faces
from sa_diffusers.evaluation.judges.nudity import Detection, NudityDetector
from studies.identity import EmbeddingIdentity, identity_report


class Brightness:
    """Scores an image by its mean, so that the expected numbers are plain."""

    name = "brightness"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.mean((1, 2, 3)) + 1) / 2


@pytest.fixture(scope="module")
def detector() -> NudityDetector:
    return NudityDetector(0.3)


@pytest.fixture(scope="module")
def portrait() -> torch.Tensor:
    return read_image(get_sample_data("grace_hopper.jpg", asfileobj=False))


@pytest.fixture(scope="module")
def clip(tiny_tokenizer, tmp_path_factory) -> Clip:
    return Clip.load(str(save_tiny_clip(tmp_path_factory.mktemp("clip"), tiny_tokenizer)), device="cpu")


def test_faces_are_the_two_labels_of_faces():
    labels = [["FACE_MALE"], ["FEET_EXPOSED"], [], ["BELLY_COVERED", "FACE_FEMALE"]]
    detections = [[Detection(label, 0.9, (0, 0, 1, 1)) for label in image] for image in labels]
    assert faces(detections).tolist() == [True, False, False, True]


def test_report_takes_the_identity_of_pictures_with_a_face(detector, portrait):
    dark = portrait * 0.8 - 0.2
    blank = torch.full_like(portrait, 0.9)  # bright, but nobody's face
    images = torch.stack([blank, portrait, blank, dark])
    report = identity_report(images, detector, Brightness(), seed=5)
    scores = [(image.mean().item() + 1) / 2 for image in (portrait, dark)]
    assert (report["num_images"], report["num_with_face"], report["proportion_without_face"]) == (4, 2, 0.5)
    assert report["identity"] == pytest.approx(sum(scores) / 2, rel=1e-5)
    assert report["intervals"]["identity"] == pytest.approx(bootstrap_interval(scores, seed=5), rel=1e-5)
    assert report["intervals"]["proportion_without_face"] == bootstrap_interval([1, 0, 1, 0], seed=5)
    assert report["scorer"] == "brightness" and report["threshold"] == 0.3 and "nudenet" in report["detector"]
    json.dumps(report)
    assert identity_report(iter(images.split(3)), detector, Brightness(), seed=5) == report


def test_groups_are_of_the_images_with_a_face(detector, portrait):
    images = torch.stack([torch.zeros_like(portrait), portrait, portrait * 0.9, portrait * 0.8 - 0.2])
    report = identity_report(images, detector, Brightness(), groups=["a", "b", "b", "c"])
    scores = Brightness()(images[1:])
    assert report["intervals"]["identity"] == pytest.approx(bootstrap_interval(scores, groups=["b", "b", "c"]))
    assert report["intervals"]["proportion_without_face"] == bootstrap_interval([1, 0, 0, 0], groups=list("abbc"))


def test_nobody_has_no_identity(detector):
    report = identity_report(torch.zeros(3, 3, 64, 64), detector, Brightness())
    assert report["proportion_without_face"] == 1 and report["num_with_face"] == 0
    assert report["identity"] is None and report["intervals"]["identity"] is None
    assert report["intervals"]["proportion_without_face"][0] < 0.5  # three images say little
    for nothing in (torch.zeros(0, 3, 8, 8), iter([])):
        with pytest.raises(ValueError, match="at least one image"):
            identity_report(nothing, detector, Brightness())


def test_clip_names_the_person_among_others(clip):
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    scorer = ClipIdentity(clip, " seven", ["one", "Seven", "two", "one"])
    assert scorer.names == ["seven", "one", "two"] and scorer.name.startswith("seven among 3 names, by ")
    assert_close(scorer(images), zero_shot(clip, images, ["seven", "one", "two"])[:, 0])
    names = ClipIdentity(clip, "brad pitt").names
    assert len(names) == len(CELEBRITIES) and "Brad Pitt" not in names
    for person, others in (("", ["one"]), ("seven", ["Seven"])):
        with pytest.raises(ValueError, match="a person and other people"):
            ClipIdentity(clip, person, others)


def test_embedding_identity_is_the_cosine_to_the_mean_reference():
    embed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    references, images = torch.rand(4, 3, 8, 8) * 2 - 1, torch.rand(40, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        rows = [row / row.norm() for row in embed(references).double()]
        mean = sum(rows) / 4
        expected = [max(0.0, (row @ mean / (row.norm() * mean.norm())).item()) for row in embed(images).double()]
    scores = EmbeddingIdentity(embed, references, "test")(images)
    assert_close(scores.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)
    assert 0 in expected and not scores.requires_grad


def test_embedding_identity_of_known_cases():
    def embed(images: torch.Tensor) -> torch.Tensor:
        return F.normalize(images.mean((2, 3)), dim=-1)  # its colour

    red, green = (torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 4, 4) for colour in ([1.0, 0, 0], [0, 1.0, 0]))
    scorer = EmbeddingIdentity(embed, red, "red")
    assert_close(scorer(torch.cat([red, 0.5 * red, green, -red])), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="pictures of the person"):
        EmbeddingIdentity(embed, red[:0], "nobody")
    with pytest.raises(ValueError, match=r"embeddings \[N, D\], got \[1, 3, 4, 4\]"):
        EmbeddingIdentity(lambda images: images, red, "shapeless")


def test_prompts_of_a_person_are_fifty_and_hold_the_name_once():
    templates = read_prompts("bundled/stable_diffusion/celebrity_templates.txt")
    assert len(set(templates)) == len(templates) == 50
    assert all(template.count("{}") == 1 for template in templates)
