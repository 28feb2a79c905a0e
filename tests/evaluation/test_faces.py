"""Faces and whose they are: labels by hand, a tiny CLIP."""

import pytest
import torch
from tiny_clip import save_tiny_clip
from torch.testing import assert_close

from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.evaluation.judges.clip import Clip, zero_shot
from sa_diffusers.evaluation.judges.faces import CELEBRITIES, ClipIdentity, faces
from sa_diffusers.evaluation.judges.nudity import Detection


@pytest.fixture(scope="module")
def clip(tiny_tokenizer, tmp_path_factory) -> Clip:
    return Clip.load(str(save_tiny_clip(tmp_path_factory.mktemp("clip"), tiny_tokenizer)))


def test_faces_are_the_two_labels_of_faces():
    labels = [["FACE_MALE"], ["FEET_EXPOSED"], [], ["BELLY_COVERED", "FACE_FEMALE"]]
    detections = [[Detection(label, 0.9, (0, 0, 1, 1)) for label in image] for image in labels]
    assert faces(detections).tolist() == [True, False, False, True]


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


def test_prompts_of_a_person_are_fifty_and_hold_the_name_once():
    templates = read_prompts("bundled/stable_diffusion/celebrity_templates.txt")
    assert len(set(templates)) == len(templates) == 50
    assert all(template.count("{}") == 1 for template in templates)
