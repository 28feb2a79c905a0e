"""Part 5 of the MNIST study: rarity, costs and their comparison, against hand computations."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from sa_diffusers.data.labelled_images import LabelledImages, load_labelled_images
from sa_diffusers.evaluation.judges.classifier import entropies
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.outliers import rarest
from studies.mnist.outliers.styles import compare, mahalanobis, spearman, styles_of
from studies.mnist.readings import Models
from studies.mnist.study import Study, StudyConfig, read


def tiny_vae(seed: int) -> ConditionalVAEPipeline:
    torch.manual_seed(seed)
    return ConditionalVAEPipeline(ConditionalVAE(8, hidden_sizes=(16,), latent_dim=3))


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(tiny_vae(1), tiny_vae(2))


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    torch.manual_seed(1)
    names = {"digit": [str(digit) for digit in range(10)]}
    return DigitClassifier(names, image_size=8, kernel_size=3, padding=1, channels=(4, 4), num_features=8).eval()


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    return load_labelled_images("digits8x8", "", "test")


def test_mahalanobis_equals_the_definition() -> None:
    points = torch.randn(30, 3) @ torch.tensor([[3.0, 0, 0], [1, 0.1, 0], [0, 2, 1]]) + 5
    inverse = np.linalg.inv(np.cov(points.double().numpy().T))
    offsets = (points.double() - points.double().mean(0)).numpy()
    expected = [math.sqrt(offset @ inverse @ offset) for offset in offsets]
    torch.testing.assert_close(mahalanobis(points), torch.tensor(expected, dtype=torch.float64))


def test_mahalanobis_refuses_points_without_a_volume() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        mahalanobis(torch.tensor([[0.0, 0], [1, 0], [2, 0]]))


def test_comparison_equals_the_formula_of_a_paired_t() -> None:
    found = compare([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # differences 2, 3, 1: mean 2, standard deviation 1
    half_width = 4.302653 / math.sqrt(3)
    assert (found.rarest, found.typical, found.wins) == (4.0, 2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half_width, 2 + half_width), rel=1e-6)
    assert found.verdict.startswith("neither")


@pytest.mark.parametrize(
    ("rarest", "verdict", "wins"), [([5.0, 6.0, 7.1], "more", 3), ([-5.0, -6.0, -7.1], "less", 0)]
)
def test_comparison_says_which_way(rarest: list[float], verdict: str, wins: int) -> None:
    found = compare(rarest, [0.1, 0.0, 0.0])
    assert (found.verdict, found.wins) == (verdict, wins)


def test_spearman_ranks_and_is_zero_for_a_constant() -> None:
    values = torch.tensor([0.1, 0.5, 3.0, 100.0])
    assert spearman(values, values.exp().log1p()) == pytest.approx(1.0)
    assert spearman(values, -values.sqrt()) == pytest.approx(-1.0)
    assert spearman(values, torch.ones(4)) == 0.0


def test_styles_are_ranked_by_the_original_and_decoded_by_both(models, classifier, images) -> None:
    styles = styles_of(models, images, 4, [classifier])
    real = images.sample((images.labels == 4).nonzero()[:, 0])
    label = torch.full((len(real),), 4)
    with torch.no_grad():
        codes = models.before.vae.encode(real, label)[0]
        pictures = {when: model.vae.decode(codes, label) for when, model in models.items()}
    order = mahalanobis(codes).argsort()
    numbers = styles.numbers()
    assert numbers["images"] == len(real)
    for name, chosen in (("rarest", order[-10:]), ("typical", order[:10])):
        for model, pixels in pictures.items():
            errors = -(real * pixels.log() + (1 - real) * (1 - pixels).log()).sum((1, 2, 3))
            seen = read(classifier, pixels)
            found = {measure: values[model] for measure, values in numbers[name].items() if measure != "rarity"}
            assert found == pytest.approx(
                {
                    "bce": float(errors[chosen].mean()),
                    "probability": float(seen[chosen, 4].mean()),
                    "entropy": float(entropies(seen)[chosen].mean()),
                    "deviation": float((pixels[chosen] - 0.5).abs().mean()),
                    "nearly_grey": sum(float((p - 0.5).abs().mean()) < 0.1 for p in pixels[chosen]) / 10,
                },
                rel=1e-4,
            )
    torch.testing.assert_close(styles.real, real[order.flip(0)[:10]])
    torch.testing.assert_close(styles.after.images, pictures["after"][order.flip(0)[:10]])
    rise = styles.after.measures["bce"] - styles.before.measures["bce"]
    expected = stats.spearmanr(mahalanobis(codes).numpy(), rise.numpy()).statistic
    assert numbers["spearman_bce"] == pytest.approx(expected, abs=1e-6)


def test_costs_are_losses_whichever_way_a_measure_points() -> None:
    found = {"rarest": {"bce": {"before": 20.0, "after": 23.0}, "probability": {"before": 0.9, "after": 0.7}}}
    assert rarest._paid({"4": found}, "rarest", rarest.COSTS["rise of BCE"]) == [3.0]
    assert rarest._paid({"4": found}, "rarest", rarest.COSTS["fall of P(digit)"]) == pytest.approx([0.2])


@pytest.mark.slow
def test_run_writes_what_it_names(models, classifier, images, tmp_path) -> None:
    study = Study(StudyConfig(base_config="configs/digits8x8_cvae.yaml", output_dir=str(tmp_path), num_threads=1))
    study.__dict__ |= {"classifiers": {"a": classifier}, "train_images": images}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    study.base = lambda latent_dim=None: tmp_path / "before"
    study.forget = lambda name, concept, **options: (tmp_path / "after", {})
    found = study.part("outliers", rarest.compute)
    assert found == json.loads((tmp_path / "outliers" / "outliers.json").read_text())
    for figure in found["figures"]:
        assert (tmp_path / "outliers" / figure["file"]).stat().st_size > 10_000
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    digits = found["numbers"]["digits"]
    kept = [each for name, each in digits.items() if name != "1"]
    rises = [each["rarest"]["bce"]["after"] - each["rarest"]["bce"]["before"] for each in kept]
    assert found["numbers"]["comparisons"]["rise of BCE"]["rarest"] == pytest.approx(np.mean(rises))
    assert found["tables"][1]["rows"][0][-1].endswith("of 9")
    text = " ".join(found["text"])
    assert "over the 9 digits of this one run" in text and "(one base model, one forgetting run)" in text
    assert f"P(1) {digits['1']['rarest']['probability']['before']:.3g}" in found["text"][0]
