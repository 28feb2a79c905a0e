"""Part 6 of the MNIST study: paired differences, gradient norms and the page, against hand computations."""

import json
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp, ttest_rel

from sa_diffusers.data.labelled_images import LabelledImages, load_labelled_images
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.families import family_defaults
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.base.labelled import negative_elbo
from sa_diffusers.runs.options import ForgetConfig
from studies.mnist.projection import comparison
from studies.mnist.projection.comparison import COLUMNS
from studies.mnist.projection.paired import Difference, holm, paired_difference
from studies.mnist.projection.runs import (
    METHODS,
    PROJECTIONS,
    REFERENCE,
    REPLAY,
    describe_gradients,
    forget_by_all,
    measure,
    retained_elbo,
)
from studies.mnist.projection.verdicts import (
    FORGOTTEN,
    FORGOTTEN_LABEL,
    KEPT,
    Comparison,
    claim,
    compare_all,
    smallest_clear,
    verdicts_table,
    verdicts_text,
)
from studies.mnist.study import Study, StudyConfig, draw


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


def compared(more_is_better: bool, **found: tuple[Difference, float | None, float | None]) -> list[Comparison]:
    words = ("worse", "better") if more_is_better else ("better", "worse")
    return [Comparison("retained P", name, "SA", words, *each) for name, each in found.items()]


@pytest.mark.parametrize(("more_is_better", "worse", "better"), [(True, "down", "up"), (False, "up", "down")])
def test_less_is_kept_by_those_whose_difference_is_clearly_for_the_worse(more_is_better, worse, better) -> None:
    up, down, same = Difference(1.0, 0.1, 5), Difference(-1.0, 0.1, 5), Difference(-1.0, 0.9, 5)
    comparisons = compared(more_is_better, up=(up, 0.01, 0.4), down=(down, 0.01, 0.4), same=(same, 1.0, 3.61))
    sentences = claim(comparisons)
    assert sentences.startswith("Retained P, difference from SA")
    assert f" By this number, that less is kept than with SA is shown for {worse}, not shown for same." in sentences
    assert sentences.endswith(f" That more is kept is shown for {better}.")
    for name, word in ((worse, "worse"), (better, "better"), ("same", "no clear difference; clear from 3.6 on")):
        assert f" in {name} ({word})" in sentences
    assert claim(comparisons[2:]).endswith("By this number, that less is kept than with SA is not shown for same.")
    assert "less is kept" not in claim([each for each in comparisons if each.method == better])


def test_what_only_its_own_interval_shows_is_no_verdict() -> None:
    down = Difference(-1.0, 0.3, 5)
    assert down.sign == -1
    (comparison,) = compared(True, down=(down, 0.06, 1.1))
    assert (comparison.clear, comparison.verdict) == (False, "worse by its own interval only")
    assert claim([comparison]).endswith("that less is kept than with SA is not shown for down.")
    (comparison,) = compared(True, down=(down, 0.04, 0.9))
    assert (comparison.clear, comparison.verdict) == (True, "worse")
    assert claim([comparison]).endswith("that less is kept than with SA is shown for down.")
    (comparison,) = compared(True, down=(down, None, None))
    assert (comparison.clear, comparison.verdict) == (False, None)


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_clear_difference_is_where_holms_verdict_turns(seed) -> None:
    """By trying: each mean just above and just below it, on either side of 0, with all others as they are."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(7, generator=generator, dtype=torch.float64) * torch.tensor([0, 1, 3, 6, 9, 20, 50])
    differences = [Difference(mean, 1.0 + 0.1 * index, 5) for index, mean in enumerate(means.tolist())]

    def clear(index: int, mean: float) -> bool:
        tried = differences[:index] + [replace(differences[index], mean=mean)] + differences[index + 1 :]
        return holm([each.p_value for each in tried])[index] < 0.05

    found = smallest_clear(differences)
    assert len({value / each.standard_error for value, each in zip(found, differences, strict=True)}) > 1  # steps
    for index, value in enumerate(found):
        for sign in (-1, 1):
            assert clear(index, sign * value * (1 + 1e-9)) and not clear(index, sign * value * (1 - 1e-9))


def test_what_five_seeds_can_show() -> None:
    """28 tests and nothing that differs take a mean of 7.4 standard errors, 3.3 standard deviations."""
    same = [Difference(0.0, 0.5, 5)] * 28
    assert smallest_clear(same) == pytest.approx([7.3924 * 0.5] * 28, rel=1e-4)
    assert smallest_clear(same[:1]) == pytest.approx([same[0].interval[1]])  # one test needs no correction
    assert smallest_clear([paired_difference([1.0], [0.0])] * 2) == [None, None]


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


def test_the_comparisons_with_selective_amnesia_are_corrected_together() -> None:
    shifted = PROJECTIONS[2].title
    numbers = numbers_of({shifted: 1.0})
    comparisons = compare_all(numbers)
    tested, others = comparisons[:16], comparisons[16:]
    assert len(others) == 12
    assert {each.reference for each in tested} == {REFERENCE.title}
    assert {each.reference for each in others} == {REPLAY.title}
    assert [each.corrected for each in tested] == pytest.approx(holm([each.difference.p_value for each in tested]))
    assert [each.smallest for each in tested] == smallest_clear([each.difference for each in tested])
    assert all(each.clear == (abs(each.difference.mean) > each.smallest) for each in tested)
    by_hand = ttest_rel(*([run[FORGOTTEN] for run in numbers[name]] for name in (shifted, REFERENCE.title)))
    last = tested[-2]
    assert (last.method, last.reference, last.label) == (shifted, REFERENCE.title, FORGOTTEN_LABEL)
    assert last.difference.p_value == pytest.approx(by_hand.pvalue)
    clear = [each for each in tested if each.clear]
    assert {each.method for each in clear} == {shifted}
    # more of a probability is better, more of the ELBO's negative is worse, farther from grey is less forgotten
    assert [each.verdict for each in clear] == ["better", "better", "worse", "less forgotten"]
    text = verdicts_text(numbers, comparisons)
    alone = sum(each.difference.sign != 0 for each in tested)
    assert text[0].startswith("16 comparisons with Selective Amnesia are tested. At 95 % each, 0.8 of them would be")
    assert f"{alone} are so by their own interval, 4 after Holm's correction" in text[0]
    # t(1 - .05 / 32; 4), and by the square root of 5
    assert "asks 5 seeds for a mean difference of 6.4 standard errors (2.8 standard deviations)" in text[0]
    assert len(text) == 1 + 3 + 1 + 3 and "(less forgotten)" in text[4]
    first = tested[0]
    assert f"({first.verdict}; clear from {first.smallest:.2g} on)" in text[1] and "clear from" not in text[5]


def test_the_comparisons_with_replay_alone_are_intervals_without_verdict() -> None:
    shifted = PROJECTIONS[0].title
    numbers = numbers_of({shifted: 1.0})
    comparisons = compare_all(numbers)
    others = comparisons[16:]
    assert {(each.corrected, each.smallest, each.verdict) for each in others} == {(None, None, None)}
    text, table = verdicts_text(numbers, comparisons), verdicts_table(comparisons)
    for sentences, key in zip(text[5:], KEPT, strict=True):
        runs = ([run[key] for run in numbers[name]] for name in (shifted, REPLAY.title))
        test = ttest_rel(*runs)
        low, high = test.confidence_interval()
        assert "difference from replay only (uncorrected 95 % interval): +" in sentences
        assert f"({low:+.4f} to {high:+.4f}) in {shifted}" in sentences
        for word in ("worse", "better", "clear", "shown"):
            assert word not in sentences
    for row, each in zip(table["rows"][16:], others, strict=True):
        assert row[3:] == [each.difference.mean, *each.difference.interval, None, None, None, None]
    assert "The 12 comparisons with replay only are not tested" in text[0]


def test_chance_is_kept_at_bay_by_the_correction() -> None:
    """Of 300 pages where nothing differs, about 5 % have a clear difference at most; without it, most of them."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(300, 16, 5, generator=generator, dtype=torch.float64)
    p_values = ttest_1samp(pages.numpy(), 0, axis=2).pvalue.tolist()
    assert sum(min(holm(page)) < 0.05 for page in p_values) / 300 < 0.09
    assert sum(min(page) < 0.05 for page in p_values) / 300 > 0.45


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
    methods = [options.pop("method", "sa") for options in others]
    projections = [f"{when}-{how}" for when in ("projection", "pcgrad") for how in ("symmetric", "alternating")]
    assert methods == ["sa", *projections]
    assert all(options == base | shared | {"ewc_lambda": 0.0} for options in others)


def test_the_options_are_those_of_a_forgetting_run() -> None:
    for method in METHODS:
        config = ForgetConfig(**family_defaults("ConditionalVAEPipeline") | {"learning_rate": 1e-3} | method.options)
        assert config.method == method.options.get("method", "sa")


@pytest.mark.slow
def test_the_part_is_a_page_of_all_methods(study, monkeypatch) -> None:
    found = study.part("projection", comparison.compute)
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
    assert [first["mean"], *first["interval"], *(first[k] for k in ("p", "p_holm", "smallest", "verdict"))] == row[3:]
    assert found["numbers"]["comparisons"][-1]["verdict"] is None
    for figure in found["figures"]:
        Image.open(study.folder / "projection" / figure["file"]).verify()
    by_seed = found["numbers"]["by_seed"]
    assert all(len(runs) == 2 for runs in by_seed.values())
    assert by_seed[REPLAY.title][0]["cosine"] is None and by_seed[REFERENCE.title][0]["conflict"] is None
    assert by_seed[PROJECTIONS[0].title][1]["cosine"] == pytest.approx(-0.8)
    monkeypatch.setattr(comparison, "compute", None)  # it is not computed again
    assert study.part("projection", comparison.compute) == found


@pytest.mark.slow
def test_one_seed_makes_a_page_without_errors(study) -> None:
    study.config.num_seeds = 1
    found = study.part("projection", comparison.compute)
    assert "±" not in found["tables"][1]["rows"][0][1]
    assert found["tables"][2]["rows"][0][4:] == [None] * 6
    assert any(
        "16 comparisons with Selective Amnesia are made, of a single seed: none of them can be tested" in text
        for text in found["text"]
    )
    told = [text for text in found["text"] if "less is kept" in text]
    titles = " and ".join(method.title for method in PROJECTIONS)
    assert len(told) == 3 and all(text.endswith(f"is not shown for {titles}.") for text in told)
    told = [text for text in found["text"] if "difference from replay only" in text]
    assert len(told) == 3 and not any("clear" in text or "interval" in text for text in told)
