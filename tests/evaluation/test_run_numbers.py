"""The numbers of a run and of pipelines: what a judge makes of each picture, and whose settings serve."""

import math

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers.core.concepts import Concept
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.evaluation.composition import swapped
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judging import RIGHT, ClassifierJudge, ClipJudge
from sa_diffusers.evaluation.options import DrawnAs, PipelineEvaluationConfig
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.evaluation.subjects import drawn_as
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig


DIGITS = ["seven", "nine", "two"]
INKS = ["red", "blue"]


def prompts(purpose: str, texts: list[str], labels: list[dict]) -> PromptSet:
    candidates = [Candidate(text, named) for text, named in zip(texts, labels, strict=True)]
    return PromptSet.seeded(purpose, candidates, lambda index: derive_seed(0, index))


def test_each_picture_is_read_as_the_classifier_reads_it_alone():
    torch.manual_seed(0)
    classifier = AttributeClassifier({"digit": DIGITS, "ink": INKS}, image_size=16, channels=(8, 8)).eval()
    judge, images = ClassifierJudge(classifier, "digit", 0), torch.rand(4, 3, 16, 16) * 2 - 1
    labels = [{"digit": "nine", "ink": "red"}, {"digit": "two"}, {"ink": "blue"}, {}]
    kept = judge(images, prompts("keeps", list("abcd"), labels), None)
    asked = judge(images, prompts("asks", list("abcd"), labels), None)
    for i, row in enumerate(labels):
        with torch.no_grad():
            read = {name: logits[0].double().softmax(0) for name, logits in classifier(images[i : i + 1]).items()}
        seen = {"digit": DIGITS[read["digit"].argmax()], "ink": INKS[read["ink"].argmax()]}
        named = "digit" in row
        expected = {
            "accuracy": float(seen["digit"] == row["digit"]) if named else math.nan,
            "probability": read["digit"][DIGITS.index(row["digit"])].item() if named else math.nan,
            "concept_shown": math.nan if named else float(seen["digit"] == "seven"),
            RIGHT + "ink": float(seen["ink"] == row["ink"]) if "ink" in row else math.nan,
            "binding": float(seen == row) if len(row) == 2 else math.nan,
        }
        found = {name: kept[name][i].item() for name in expected}
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
        entropy = -sum(p * math.log(p) for p in read["digit"].tolist())
        assert asked["concept_probability"][i].item() == pytest.approx(read["digit"][0].item(), rel=1e-5)
        assert asked["concept_entropy"][i].item() == pytest.approx(entropy, rel=1e-5)
    assert_close(kept["attributes"], kept[RIGHT + "ink"], equal_nan=True)
    assert "accuracy" not in asked and "binding" not in asked


def test_all_that_a_prompt_names_counts_at_once_without_what_was_forgotten():
    classifier = AttributeClassifier({"digit": DIGITS, "ink": INKS}, image_size=16, channels=(8, 8))
    right = {"digit": torch.tensor([1, 1, 0, math.nan, 1]), "ink": torch.tensor([1.0, 0, 1, 1, 1])}
    named = [("nine", "red"), ("nine", "blue"), ("two", "red"), (None, "red"), ("seven", "red")]
    labels = [{"digit": digit, "ink": ink} if digit else {"ink": ink} for digit, ink in named]
    found = ClassifierJudge(classifier, "digit", 0)._at_once(right, prompts("keeps", list("abcde"), labels))
    assert_close(found, torch.tensor([1.0, 0, 0, math.nan, math.nan]), equal_nan=True)


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("a red cube and a blue ball", "a blue cube and a red ball"),
        ("two cats and five red dogs", "five cats and two red dogs"),
        ("a small dog to the left of a tree", "a tree to the left of a small dog"),
        ("a black and white photo", None),
        ("a red cube, a blue ball and a green cone", None),
        ("a red cube beside a red ball", None),
        ("a dog behind a dog", None),
        ("a photo of the river under the sky at noon", None),
    ],
)
def test_two_things_of_a_prompt_are_exchanged(prompt, other):
    assert swapped(prompt) == other


def test_every_prompt_that_ships_for_this_has_two_things():
    shipped = read_prompts("bundled/stable_diffusion/composed_prompts.txt")
    others = list(map(swapped, shipped))
    assert len(shipped) == len(set(shipped)) == 44 and None not in others and not set(others) & set(shipped)


def test_pictures_are_told_from_those_of_the_exchanged_prompt(monkeypatch):
    said = {"a red cube and a blue ball": 3.0, "a blue cube and a red ball": 2.0, "two cats and five dogs": 1.0,
            "five cats and two dogs": 1.5, "a dog": 2.5}  # fmt: skip
    monkeypatch.setattr(
        "sa_diffusers.evaluation.judging.clip_score",
        lambda clip, images, texts: images.flatten(1).mean(1) * torch.tensor([said[text] for text in texts]),
    )
    texts = ["a dog", "a red cube and a blue ball", "two cats and five dogs"]
    judge, images = ClipJudge(None, Concept(("seven",), "noise")), torch.ones(3, 3, 4, 4)
    found = judge(images, prompts("keeps", texts, [{}] * 3), None)
    assert_close(found["clip_binding"], torch.tensor([math.nan, 1.0, 0.0]), equal_nan=True)
    assert "clip_binding" not in judge(images, prompts("asks", texts, [{}] * 3), None)


def test_classifiers_of_a_run_agree_on_the_classes(tmp_path):
    for name, digits in (("one", DIGITS), ("other", ["seven", "9", "2"])):
        classifier = AttributeClassifier({"digit": digits}, image_size=16, channels=(8, 8))
        classifier.save_pretrained(tmp_path / name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a seven", "form": "seen", "digit": "seven"}\n')
    config = ForgetConfig(
        concept="seven", surrogate="nine", replay_prompts="bundled/digits/replay_prompts.txt",
        classifier=[str(tmp_path / "one"), str(tmp_path / "other")], eval_prompts=str(rows),
    )  # fmt: skip
    with pytest.raises(ValueError, match="classifiers of a run name the concept's classes differently"):
        read_inputs(config)


def test_what_lies_beside_a_bundled_pipeline_serves_where_nothing_is_given():
    config = PipelineEvaluationConfig(pipeline="bundled/digits/pipeline", concept="seven, 7")
    assert (config.metric_names, config.judge) == (["classifier"], "bundled/digits/classifier")
    assert config.made_by["eval_prompts"] == "bundled/digits/eval_prompts.jsonl"
    assert drawn_as(config.pipeline, config.drawn_as) == DrawnAs(2.5, 10, "dpmsolver++")
    assert drawn_as(config.pipeline, DrawnAs(4.0)) == DrawnAs(4.0, 10, "dpmsolver++")
