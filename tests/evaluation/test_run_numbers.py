"""The numbers of a run and of pipelines: what a judge makes of each picture, and whose settings serve."""

import math

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judging import RIGHT, ClassifierJudge
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
        }
        found = {name: kept[name][i].item() for name in expected}
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
        entropy = -sum(p * math.log(p) for p in read["digit"].tolist())
        assert asked["concept_probability"][i].item() == pytest.approx(read["digit"][0].item(), rel=1e-5)
        assert asked["concept_entropy"][i].item() == pytest.approx(entropy, rel=1e-5)
    assert_close(kept["attributes"], kept[RIGHT + "ink"], equal_nan=True)
    assert "accuracy" not in asked


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
