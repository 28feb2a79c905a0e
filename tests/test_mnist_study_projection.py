"""Part 6 of the MNIST study: paired differences, gradient norms and the page, against hand computations."""

import json
import math
from itertools import combinations

import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp, ttest_rel

from sa_diffusers.config import ForgetConfig
from sa_diffusers.evaluation.digit_classifier import DigitClassifier
from sa_diffusers.labelled_images import LabelledImages, load_labelled_images
from sa_diffusers.labelled_training import negative_elbo
from sa_diffusers.loading import family_defaults
from sa_diffusers.mnist_study import projection
from sa_diffusers.mnist_study.paired import Difference, holm, paired_difference
from sa_diffusers.mnist_study.projection import COLUMNS
from sa_diffusers.mnist_study.projection_runs import (
    METHODS,
    PROJECTIONS,
    REFERENCE,
    REPLAY,
    describe_gradients,
    forget_by_all,
    measure,
    retained_elbo,
)
from sa_diffusers.mnist_study.projection_verdicts import (
    FORGOTTEN,
    FORGOTTEN_LABEL,
    KEPT,
    Comparison,
    claim,
    compare_all,
    verdicts_text,
)
from sa_diffusers.mnist_study.study import Study, StudyConfig, draw
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline


STEPS = (1, 5, 10, 15)


def metrics(probability: float) -> dict:
    """What two classifiers say: the second one's numbers are .1 below the first one's."""
    keys = ("concept_probability", "concept_entropy", "retained_probability", "retained_worst_probability")
    first, second = (dict.fromkeys(keys, value) for value in (probability, probability - 0.1))
    return {side: first for side in ("before", "after")} | {
        "by_classifier": {side: {"second": second} for side in ("before", "after")}
    }


@pytest.fixture
def study(tmp_path) -> Study:
    """Each run gives other weights, other numbers and a history; what was asked of it is in `asked`."""
    config = StudyConfig(
        base_config="configs/digits8x8_cvae.yaml",
        output_dir=str(tmp_path),
        num_images=20,
        num_seeds=2,
        num_threads=1,
        projection_steps=40,
    )
    study = Study(config)
    torch.manual_seed(1)
    names = {"digit": [str(digit) for digit in range(10)]}
    study.__dict__["classifiers"] = {
        name: DigitClassifier(names, image_size=8, kernel_size=3, padding=1, channels=(4, 4), num_features=8).eval()
        for name in ("first", "second")
    }
    data = load_labelled_images("digits8x8", "", "test")
    study.__dict__["test_images"] = LabelledImages(data.images[:100], data.labels[:100], data.names)
    study.asked = {}

    def save(name: str, seed: int):
        folder = tmp_path / "runs" / name
        if not folder.exists():
            torch.manual_seed(seed)
            ConditionalVAEPipeline(ConditionalVAE(8, hidden_sizes=(16,), latent_dim=3)).save_pretrained(
                folder / "pipeline"
            )
        return folder

    def forget(name, concept, **options):
        order = len(study.asked)
        study.asked[name] = options
        folder = save(name, order)
        cosine = {"gradient_cosine": -0.1 * order} if "projection" in options.get("method", "") else {}
        rows = [{"step": s, "grad_norm": 100 / s + order, "learning_rate": 0.01 / s} | cosine for s in STEPS]
        (folder / "history.json").write_text(json.dumps(rows))
        return folder / "pipeline", metrics(0.5 + 0.01 * order)

    study.forget = forget
    study.base = lambda: save("base", 100) / "pipeline"
    return study


# --- differences within a seed


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.05, -0.05, 1.0])
def test_a_paired_difference_is_that_of_students_test(shift) -> None:
    values, reference = (torch.rand(5, dtype=torch.float64) for _ in range(2))
    values = (reference + 0.05 * (values - 0.5) + shift).tolist()
    found = paired_difference(values, reference.tolist())
    differences = [a - b for a, b in zip(values, reference.tolist(), strict=True)]
    centre = sum(differences) / 5
    error = math.sqrt(sum((d - centre) ** 2 for d in differences) / 4 / 5)
    assert (found.mean, found.standard_error, found.count) == (pytest.approx(centre), pytest.approx(error), 5)
    test = ttest_rel(values, reference.tolist())
    assert found.sign == (math.copysign(1, centre) if test.pvalue < 0.05 else 0)
    assert str(found) == f"{centre:+.4f} ± {error:.4f}"


def test_one_pair_has_no_error_and_says_nothing() -> None:
    found = paired_difference([2.0], [1.0])
    assert (found.mean, found.standard_error, found.sign, str(found)) == (1.0, None, 0, "+1.0000")
    with pytest.raises(ValueError, match="at least one, got 0, 0"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="got 1, 2"):
        paired_difference([1.0], [1.0, 2.0])


def closed_testing(p_values: list[float]) -> list[float]:
    """Holm's method by its definition: the largest Bonferroni p-value of all sets of tests that hold the one."""
    indices = range(len(p_values))
    sets = [chosen for size in range(1, len(p_values) + 1) for chosen in combinations(indices, size)]
    return [
        max(min(1.0, len(chosen) * min(p_values[j] for j in chosen)) for chosen in sets if i in chosen)
        for i in indices
    ]


@pytest.mark.parametrize(
    "p_values",
    [[0.01, 0.04, 0.03, 0.005], [0.2, 0.9, 0.6], [0.0, 0.0, 0.04], [0.03], [0.01] * 5, [0.5, 0.001, 0.02, 0.02, 0.9]],
)
def test_holms_correction_is_that_of_closed_testing(p_values) -> None:
    assert holm(p_values) == pytest.approx(closed_testing(p_values))


def test_the_interval_and_the_p_value_are_not_corrected() -> None:
    values, reference = [1.0, 2.5, 2.0, 4.0], [0.5, 0.5, 1.5, 1.0]
    found, test = paired_difference(values, reference), ttest_rel(values, reference)
    assert found.interval == pytest.approx(tuple(test.confidence_interval()))
    assert found.p_value == pytest.approx(test.pvalue)
    assert (paired_difference([1.0], [0.0]).interval, paired_difference([1.0], [0.0]).p_value) == (None, None)
    same, shifted = Difference(0.0, 0.0, 3), Difference(0.5, 0.0, 3)
    assert (same.p_value, same.sign, shifted.p_value, shifted.sign) == (1.0, 0, 0.0, 1)


def compared(more_is_better: bool, **found: tuple[Difference, float | None]) -> list[Comparison]:
    words = ("worse", "better") if more_is_better else ("better", "worse")
    return [Comparison("retained P", name, "SA", words, *each) for name, each in found.items()]


@pytest.mark.parametrize(("more_is_better", "worse", "better"), [(True, "down", "up"), (False, "up", "down")])
def test_less_is_kept_by_those_whose_difference_is_clearly_for_the_worse(more_is_better, worse, better) -> None:
    up, down, same = Difference(1.0, 0.1, 5), Difference(-1.0, 0.1, 5), Difference(-1.0, 0.9, 5)
    comparisons = compared(more_is_better, up=(up, 0.01), down=(down, 0.01), same=(same, 1.0))
    sentences = claim(comparisons)
    assert sentences.startswith("Retained P, difference from SA")
    assert sentences.endswith(f"By this number less than with SA is kept by {worse}.")
    for name, word in ((worse, "worse"), (better, "better"), ("same", "no clear difference")):
        assert f" in {name} ({word})" in sentences
    assert claim(compared(True, same=(same, 1.0))).endswith("is kept by none of them.")


def test_what_only_its_own_interval_shows_is_no_verdict() -> None:
    down = Difference(-1.0, 0.3, 5)
    assert down.sign == -1
    (comparison,) = compared(True, down=(down, 0.06))
    assert (comparison.clear, comparison.verdict) == (False, "worse by its own interval only")
    assert claim([comparison]).endswith("is kept by none of them.")
    (comparison,) = compared(True, down=(down, 0.04))
    assert (comparison.clear, comparison.verdict) == (True, "worse")


def numbers_of(shift: dict[str, float], seeds: int = 5) -> dict[str, list[dict]]:
    """Every measure of every method: noise of .01 a run, and its method's shift."""
    generator = torch.Generator().manual_seed(0)
    keys = (*KEPT, FORGOTTEN)
    return {
        method.title: [
            {key: shift.get(method.title, 0.0) + 0.01 * torch.randn((), generator=generator).item() for key in keys}
            for _ in range(seeds)
        ]
        for method in METHODS
    }


def test_all_comparisons_are_corrected_together() -> None:
    shifted = PROJECTIONS[2].title
    numbers = numbers_of({shifted: 1.0})
    comparisons = compare_all(numbers)
    assert len(comparisons) == 4 * (2 * 3 + 1)
    assert [each.corrected for each in comparisons] == pytest.approx(
        holm([each.difference.p_value for each in comparisons])
    )
    by_hand = ttest_rel(*([run[FORGOTTEN] for run in numbers[name]] for name in (shifted, REFERENCE.title)))
    last = comparisons[-2]
    assert (last.method, last.reference, last.label) == (shifted, REFERENCE.title, FORGOTTEN_LABEL)
    assert last.difference.p_value == pytest.approx(by_hand.pvalue)
    clear = [each for each in comparisons if each.clear]
    assert {each.method for each in clear} == {shifted} and len(clear) == 7
    # more of a probability is better, more of the ELBO's negative is worse, farther from grey is less forgotten
    assert [each.verdict for each in clear] == ["better", "better", "worse"] * 2 + ["less forgotten"]
    text = verdicts_text(numbers, comparisons)
    alone = sum(each.difference.sign != 0 for each in comparisons)
    assert text[0].startswith("28 comparisons are made. At 95 % each, 1.4 of them would be expected")
    assert f"{alone} are so by their own interval, 7 after Holm's correction" in text[0]
    assert len(text) == 1 + 6 + 1 and "(less forgotten)" in text[-1]


def test_chance_is_kept_at_bay_by_the_correction() -> None:
    """Of 300 pages where nothing differs, about 5 % have a clear difference at most; without it, most of them."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(300, 28, 5, generator=generator, dtype=torch.float64)
    p_values = ttest_1samp(pages.numpy(), 0, axis=2).pvalue.tolist()
    assert sum(min(holm(page)) < 0.05 for page in p_values) / 300 < 0.09
    assert sum(min(page) < 0.05 for page in p_values) / 300 > 0.6


# --- what is measured of a run


def test_gradients_are_described_by_their_logarithms() -> None:
    norms = [1000.0, 100.0, 1000.0, 10.0, 1.0, 10.0]
    rows = [{"grad_norm": norm, "learning_rate": 0.1 * index} for index, norm in enumerate(norms)]
    found = describe_gradients(rows)
    assert (found["log_norm_first"], found["log_norm_late"]) == (3, 1)
    assert found["jump"] == pytest.approx(10)  # of 10, 10 and 100
    assert found["learning_rate"] == pytest.approx(0.5)
    assert found["cosine"] is None and found["conflict"] is None
    cosines = [-0.5, 0.0, 0.2, -0.1, 0.1, 0.0]
    found = describe_gradients([row | {"gradient_cosine": c} for row, c in zip(rows, cosines, strict=True)])
    assert (found["cosine"], found["conflict"]) == (pytest.approx(-0.05), pytest.approx(1 / 3))


def test_the_elbo_is_that_of_the_retained_digits(study) -> None:
    data, pipeline = study.test_images, study.load(study.base())
    kept = [index for index, label in enumerate(data.labels.tolist()) if label != 1]
    expected = negative_elbo(pipeline, LabelledImages(data.images[kept], data.labels[kept], data.names)).mean()
    assert 0 < len(kept) < 100
    assert retained_elbo(study, pipeline) == pytest.approx(expected.item())


def test_measures_are_means_over_the_classifiers(study) -> None:
    pipeline = study.load(study.base())
    found = measure(study, pipeline, metrics(0.7))
    for key in ("concept_probability", "retained_probability", "retained_worst_probability_before"):
        assert found[key] == pytest.approx(0.65)
    images = draw(pipeline, 1, 20, 0)
    assert found["concept_deviation"] == pytest.approx(sum(abs(x - 0.5) for x in images.flatten().tolist()) / 20 / 64)


# --- the runs and the page


def test_the_methods_share_a_seeds_samples_and_differ_in_the_method_alone(study) -> None:
    found = forget_by_all(study, seed=3)
    assert list(found) == list(METHODS) and len(set(study.asked)) == 6
    first, *others = study.asked.values()
    folder = study.folder / "runs" / "projection/selective_amnesia_seed_3"
    shared = {"samples": str(folder / "samples"), "before": str(folder / "evaluation" / "before.safetensors")}
    base = {"seed": 3, "num_train_steps": 40, "latents": "encoder", "logging_steps": 5}
    assert first == base
    methods = [options.pop("method", "selective_amnesia") for options in others]
    projections = [f"{when}-{how}" for when in ("projection", "pcgrad") for how in ("symmetric", "alternating")]
    assert methods == ["selective_amnesia", *projections]
    assert all(options == base | shared | {"ewc_lambda": 0.0} for options in others)


def test_the_options_are_those_of_a_forgetting_run() -> None:
    for method in METHODS:
        config = ForgetConfig(**family_defaults("ConditionalVAEPipeline") | {"learning_rate": 1e-3} | method.options)
        assert config.method == method.options.get("method", "selective_amnesia")


def test_the_part_is_a_page_of_all_methods(study, monkeypatch) -> None:
    found = projection.run(study)
    table, differences, verdicts = found["tables"]
    assert [row[0] for row in table["rows"]] == ["original", *(method.title for method in METHODS)]
    for part in found["tables"]:
        assert all(len(row) == len(part["columns"]) for row in part["rows"])
    # runs 0 to 5 have the first seed, 6 to 11 the second: .45 and .51 over the classifiers, .04 apart
    cell = table["rows"][1][1 + list(COLUMNS).index("retained_probability")]
    assert cell == f"0.480 ± {0.06 / math.sqrt(2):.3f}"
    assert ["replay only - Selective Amnesia", "+0.0100 ± 0.0000"] == differences["rows"][0][:2]
    assert ["Selective Amnesia - replay only", "-0.0100 ± 0.0000"] == differences["rows"][5][:2]
    assert len(differences["rows"]) == 10 and len(verdicts["rows"]) == 28
    first, row = found["numbers"]["comparisons"][0], verdicts["rows"][0]
    assert (first["measure"], first["method"]) == tuple(row[:2]) == ("retained P", PROJECTIONS[0].title)
    assert [first["mean"], *first["interval"], first["p"], first["p_holm"], first["verdict"]] == row[3:]
    for figure in found["figures"]:
        Image.open(study.folder / "projection" / figure["file"]).verify()
    by_seed = found["numbers"]["by_seed"]
    assert all(len(runs) == 2 for runs in by_seed.values())
    assert by_seed[REPLAY.title][0]["cosine"] is None and by_seed[REFERENCE.title][0]["conflict"] is None
    assert by_seed[PROJECTIONS[0].title][1]["cosine"] == pytest.approx(-0.8)
    monkeypatch.setattr(projection, "_compute", None)  # it is not computed again
    assert projection.run(study) == found


def test_one_seed_makes_a_page_without_errors(study) -> None:
    study.config.num_seeds = 1
    found = projection.run(study)
    assert "±" not in found["tables"][1]["rows"][0][1]
    assert found["tables"][2]["rows"][0][4:] == [None, None, None, None, "no clear difference"]
    assert any(
        "28 comparisons are made, of a single seed: none of them can be tested" in text for text in found["text"]
    )
    assert all("is kept by none of them" in text for text in found["text"] if "is kept by" in text)
