"""Completions judged: errors by hand, a classifier's reading, and a new decoder by ridge regression."""

import pytest
import torch
from tiny_mae import tiny_mae
from torch.testing import assert_close

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.data.picture_groups import PictureGroup, read_group
from sa_diffusers.evaluation.completion import completed, examine_completions, fresh_decoder, measured, ridge
from sa_diffusers.evaluation.images.metrics import frechet_distance, inception_score
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.options import MetricSettings
from sa_diffusers.families import get_family
from sa_diffusers.report.verdict import verdict


@pytest.fixture(scope="module")
def groups():
    return {
        name: read_group(f"digits8x8:{names}", name, 8, (30, 6))
        for name, names in (("forget", "2,5"), ("retain", "0,1"), ("other", "7"))
    }


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return DigitClassifier({"digit": [str(i) for i in range(10)]}, image_size=8, kernel_size=3, padding=1).eval()


@torch.no_grad()
def test_numbers_of_a_group(groups, classifier):
    family = get_family(tiny_mae())
    truth, filled, hole = completed(family, groups["forget"], "half", 0)
    values, intervals = measured(truth, filled, hole, groups["forget"], classifier)
    data = groups["forget"].test
    expected = family.complete(2 * data.sample(range(12)) - 1, [Condition(mask="half")] * 12, [0] * 12)
    errors = [(expected[i, 0, 2:6, 2:6] - truth[i, 0, 2:6, 2:6]).double().square().mean() for i in range(12)]
    assert values["masked_mse"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-6)
    read = classifier.named(classifier.probabilities(expected.expand(-1, 3, -1, -1)))["digit"]
    right = [name == data.names[label] for name, label in zip(read, data.labels.tolist(), strict=True)]
    assert values["accuracy"] == pytest.approx(sum(right) / 12)
    assert intervals["accuracy"][0] <= values["accuracy"] <= intervals["accuracy"][1]
    features = [classifier.features(images.expand(-1, 3, -1, -1)) for images in (truth, filled)]
    assert values["frechet_distance"] == pytest.approx(frechet_distance(real=features[0], generated=features[1]))
    assert values["num_images"] == 12
    ratios = [10 * torch.log10(2**2 / error) for error in errors]
    assert values["psnr"] == pytest.approx(torch.stack(ratios).mean().item())
    cosines = [a @ b / (a.norm() * b.norm()) for a, b in zip(*features, strict=True)]
    assert values["feature_cosine"] == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-5)
    logits = classifier.probabilities(expected.expand(-1, 3, -1, -1))["digit"].log()
    score = inception_score(logits, MetricSettings(num_splits=1))["mean"]
    assert values["classifier_score"] == pytest.approx(score, rel=1e-6)
    assert set(intervals) == {"masked_mse", "psnr", "accuracy", "feature_cosine"}
    perfect, _ = measured(truth, truth, hole, groups["forget"], None)
    unread = dict.fromkeys(("accuracy", "feature_cosine", "classifier_score", "frechet_distance"))
    assert perfect == {"masked_mse": 0.0, "psnr": pytest.approx(100), **unread, "num_images": 12}
    assert measured(truth, truth, hole, groups["forget"], classifier)[0]["feature_cosine"] == pytest.approx(1)


def test_every_group_and_mask_is_judged(groups, classifier):
    judges = {"judge": ClassifierJudge(classifier, "digit", 2)}
    found = examine_completions(get_family(tiny_mae()), groups, judges, ["half", "ring"], 0)
    names = {f"{name}{mask}" for name in ("forget", "retain", "third") for mask in ("", ", ring")}
    assert set(found.values) == set(found.intervals) == names | {"fresh_decoder"}
    assert found.values["forget"]["masked_mse"] != found.values["forget, ring"]["masked_mse"]
    assert len(found.captions) == len(found.pictures) == len(found.beside["truth"]) == 12 + 12 + 6


def test_ridge_is_the_closed_form_with_the_penalty_that_leaves_the_least_error():
    torch.manual_seed(0)
    inputs, weights = torch.randn(20, 30), torch.randn(30, 3)
    targets = inputs @ weights + 0.5 * torch.randn(20, 3) + 2
    asked = torch.randn(5, 30)
    everything, wanted = inputs.double(), targets.double()
    x, y = everything - everything.mean(0), wanted - wanted.mean(0)
    scale = (x @ x.T).trace() / 20
    best = []
    for power in range(-5, 3):
        penalty = 10.0**power * scale * torch.eye(30, dtype=torch.float64)
        left = []
        for out in range(20):  # fitted to the others alone, their mean included
            rest = [row for row in range(20) if row != out]
            centre, level = everything[rest].mean(0), wanted[rest].mean(0)
            a, b = everything[rest] - centre, wanted[rest] - level
            found = torch.linalg.solve(a.T @ a + penalty, a.T @ b)
            left.append(((everything[out] - centre) @ found + level - wanted[out]).square().mean())
        best.append((torch.stack(left).mean().item(), torch.linalg.solve(x.T @ x + penalty, x.T @ y)))
    chosen = min(best, key=lambda pair: pair[0])[1]
    expected = (asked.double() - inputs.double().mean(0)) @ chosen + targets.double().mean(0)
    assert_close(ridge(inputs, targets, asked), expected, rtol=1e-6, atol=1e-8)


def test_ridge_from_what_tells_nothing_apart_is_the_mean():
    targets = torch.randn(4, 3)
    for inputs, wanted in ((torch.ones(4, 5), targets), (torch.randn(1, 5), targets[:1])):
        found = ridge(inputs, wanted, torch.randn(2, 5))
        assert_close(found, wanted.double().mean(0).expand(2, -1))


def test_a_new_decoder_finds_what_visible_pixels_tell():
    torch.manual_seed(0)
    level = torch.rand(80, 1, 1, 1)  # each picture is of one brightness: the hole follows from the rest
    images = (level * 255).round().to(torch.uint8).expand(-1, 1, 8, 8)
    data = LabelledImages(images, torch.zeros(80, dtype=torch.long), ["flat"])
    group = PictureGroup("flat", data.take(torch.arange(60)), data.take(torch.arange(60, 80)))
    errors = fresh_decoder(get_family(tiny_mae()), {"forget": group}, "half", 0)
    assert {len(part) for part in errors.values()} == {20}
    assert errors["visible_pixels"].mean() < 1e-3
    assert errors["masked_mse"].mean() < 0.05


def found(forget: float, retain: float, decoder: float) -> dict:
    def side(**errors: float) -> tuple[dict, dict]:
        values = {name: {"masked_mse": error} for name, error in errors.items()}
        return values, {name: {"masked_mse": (error - 0.02, error + 0.02)} for name, error in errors.items()}

    before, after = (
        side(forget=0.2, retain=0.2, fresh_decoder=0.4),
        side(forget=forget, retain=retain, fresh_decoder=decoder),
    )
    intervals = {"before": before[1], "after": after[1]}
    return {"before": before[0], "after": after[0], "intervals": intervals, "surrogate": "noise"}


REMEDIES = ("raise alpha", "lower alpha")


def test_the_verdict_goes_by_intervals():
    said, advice = verdict(found(0.5, 0.21, 0.41), REMEDIES)
    assert said.startswith("Forgotten: ") and "Damage" not in said and not advice
    assert "Not erased against a new decoder" in said
    said, advice = verdict(found(0.21, 0.5, 0.6), REMEDIES)
    assert said.startswith("Not clearly forgotten: ") and "Damage: of pictures to retain 0.5 [0.48, 0.52]" in said
    assert "Not erased" not in said and "raise alpha" in advice
    assert "lower alpha" in verdict(found(0.5, 0.5, 0.6), REMEDIES)[1]
    single = found(0.5, 0.2, 0.4)
    for side in ("before", "after"):
        single["intervals"][side] = {name: {"masked_mse": None} for name in single[side]}
    assert verdict(single, REMEDIES)[0].startswith(
        "Not clearly forgotten: error in the holes of pictures to forget 0.5 (before"
    )
