"""Part 1 of the MNIST study: the runs that it asks for, and its tables and verdicts against hand computations."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.families import family_defaults
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.loop import TrainingDiverged
from studies.mnist.page import collect
from studies.mnist.paper import bars, results
from studies.mnist.paper.comparisons import compare_ablations, deviation, naive_verdict
from studies.mnist.paper.runs import LAMBDAS, Run, ablation_runs, default_run, faithful_run, fast_run
from studies.mnist.spread import readings, short_names, spread
from studies.mnist.study import Study, StudyConfig
from tests.browser import assert_whole


NAMES = {"digit": [str(digit) for digit in range(10)]}
FIRST, SECOND = "runs/seed_0/classifier", "runs/seed_1/classifier"
SECONDS = {"sample": 1.0, "surrogate": 0.5, "fisher": 2.0, "train": 8.0, "evaluate": 0.5, "total": 12.0, "reused": []}


def values(probability: float, entropy: float, retained: float = 0.97, worst: float = 0.9) -> dict:
    """What a classifier says that reads flat grey as the digit with probability .04, with an entropy of 2 nats."""
    return {
        "concept_probability": probability,
        "concept_entropy": entropy,
        "retained_probability": retained,
        "retained_worst_probability": worst,
        "grey_probability": 0.04,
        "grey_entropy": 2.0,
        "noise_probability": 0.3,
        "noise_entropy": 1.0,
        "classifier_accuracy": 0.98,
    }


METRICS = {
    "before": values(0.96, 0.1),
    "after": values(0.05, 2.1),
    "by_classifier": {"before": {SECOND: values(0.98, 0.2)}, "after": {SECOND: values(0.07, 1.9, 0.95, 0.8)}},
    "seconds": SECONDS,
}


@pytest.fixture
def study(tmp_path) -> Study:
    """A study with an untrained model of 8x8 pixels and two untrained classifiers."""
    torch.manual_seed(0)
    model = tmp_path / "base" / "pipeline"
    ConditionalVAEPipeline(ConditionalVAE(8, hidden_sizes=(16,), latent_dim=3)).save_pretrained(model)
    study = Study(StudyConfig(output_dir=str(tmp_path / "study"), model=str(model), num_images=4, num_threads=1))
    small = {"image_size": 8, "kernel_size": 3, "padding": 1, "channels": (4, 4), "num_features": 8}
    study.__dict__["classifiers"] = {name: DigitClassifier(NAMES, **small) for name in (FIRST, SECOND)}
    return study


class Recorder:
    """Stands for `Study.forget`: keeps what each run was asked for, by its name."""

    def __init__(self, study: Study, diverging: str = ""):
        self.study, self.diverging, self.asked = study, diverging, {}

    def __call__(self, name: str, concept: int, **options) -> tuple[Path, dict]:
        self.asked[name] = options | {"concept": concept}
        if name == self.diverging:
            raise TrainingDiverged("loss nan")
        return self.study.folder / "runs" / name / "pipeline", METRICS


def config_of(options: dict) -> ForgetConfig:
    """The configuration that a run with these options gets; refuses what does not go together."""
    known = {name: value for name, value in options.items() if name != "concept"}
    return config_from_dict(ForgetConfig, family_defaults("ConditionalVAEPipeline") | known).resolved()


def test_short_names_are_those_of_the_training_folders() -> None:
    assert short_names([FIRST, SECOND, "wide"]) == {FIRST: "seed_0", SECOND: "seed_1", "wide": "wide"}
    same = ["a/seed_0/classifier", "b/seed_0/classifier"]
    assert short_names(same) == {name: name for name in same}


def test_spread_has_the_standard_deviation_of_a_sample() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert spread([0.25]) == "0.250"
    assert spread([]) == "–"


def test_readings_put_the_first_classifier_with_the_others(study) -> None:
    found = readings(study, METRICS, "after")
    assert list(found) == ["seed_0", "seed_1"]
    assert [own["concept_probability"] for own in found.values()] == [0.05, 0.07]


def test_readings_refuse_a_run_that_others_judged(study) -> None:
    others = METRICS | {"by_classifier": {"before": {}, "after": {}}}
    with pytest.raises(ValueError, match="seed_1"):
        readings(study, others, "after")


def test_bars_are_for_the_authors_architecture(study) -> None:
    authors = {name: DigitClassifier(NAMES) for name in (FIRST, SECOND)}
    narrow = DigitClassifier(NAMES, channels=(4, 4))
    wide = AttributeClassifier(NAMES, image_size=28, channels=(8,))
    study.__dict__["classifiers"] = authors
    assert bars.judges(study) == bars.Judges(("seed_0", "seed_1"), "the 2 classifiers of the authors' architecture")
    study.__dict__["classifiers"] = {"narrow": narrow, FIRST: authors[FIRST], "wide": wide}
    assert bars.judges(study) == bars.Judges(
        ("seed_0",), "the one classifier of the authors' architecture (2 of another left out)"
    )
    # An architecture that nobody asked for is not called the authors'.
    study.__dict__["classifiers"] = {"narrow": narrow, "wide": wide}
    assert bars.judges(study) == bars.Judges(
        ("narrow", "wide"), "the 2 classifiers of the study (not of the authors' architecture)"
    )
    study.__dict__["classifiers"] = {"wide": wide}
    assert bars.judges(study).words == "the one classifier of the study (not of the authors' architecture)"


def test_a_classifier_that_was_loaded_has_the_authors_architecture(study, tmp_path) -> None:
    DigitClassifier(NAMES).save_pretrained(tmp_path / "saved")
    study.__dict__["classifiers"] = {"saved": DigitClassifier.from_pretrained(tmp_path / "saved")}
    assert bars.judges(study).words == "the one classifier of the authors' architecture"


def test_judges_pick_their_part() -> None:
    assert bars.Judges(("b",), "").of({"a": {"x": 1.0}, "b": {"x": 2.0}}) == {"b": {"x": 2.0}}


def test_bars_compare_means_over_the_classifiers_and_each_classifier_with_itself(study) -> None:
    found = bars.differences(0, readings(study, METRICS, "before"), readings(study, METRICS, "after"))
    # Entropies 2.1 and 1.9 have the mean of flat grey, 2, though both classifiers are .1 away from it.
    assert list(found.values()) == pytest.approx([0.0, 0.06 - 0.04, 0.97 - 0.96, 0.9 - 0.85, 0.1])
    assert list(found) == list(bars.limits(0)) and len(bars.ASKED) == 4


def test_the_stricter_bar_compares_each_classifier_with_its_own_grey() -> None:
    # Each reads what it reads in grey, which differs between them: nothing is missing.
    sides = [values(0.1, entropy) | {"grey_entropy": entropy} for entropy in (0.5, 2.0)]
    found = bars.differences(3, *[dict(enumerate(sides))] * 2)
    (stricter,) = bars.STRICTER
    assert found[stricter] == 0
    sides[0]["concept_entropy"] += 0.3
    sides[1]["concept_entropy"] -= 0.2
    found = bars.differences(3, *[dict(enumerate(sides))] * 2)
    assert found[stricter] == pytest.approx((0.3 + 0.2) / 2)
    assert found["mean entropy, distance from that of flat grey (nats)"] == pytest.approx((0.3 - 0.2) / 2)


def test_verdict_names_each_bar_that_is_missed() -> None:
    limits, judged = bars.limits(0), bars.Judges(("a",), "the one classifier")
    met = bars.runs_text(0, {"fast": limits}, judged)[0]
    assert met == "Judged by the one classifier, the fast run meets every bar, and also meets the stricter one."
    missed = bars.runs_text(0, {"fast": limits | {"mean P(0), above that of flat grey": 0.021}}, judged)[0]
    assert "misses 1 of the 4 bars: mean P(0), above that of flat grey: 0.0210 (at most 0.02), but meets" in missed
    (stricter,) = bars.STRICTER
    both = bars.runs_text(0, {"fast": limits | {stricter: 0.2}}, judged)[0]
    assert f"meets every bar, but misses the stricter one: {stricter}: 0.2000 (at most 0.1)" in both


def test_every_digit_has_its_row_of_bars() -> None:
    low = [value / 2 for value in bars.limits(0).values()]
    found = {digit: dict(zip(bars.limits(digit), low, strict=True)) for digit in (0, 7, 8)}
    found[7]["mean P(7), above that of flat grey"] = 0.03
    (stricter,) = bars.STRICTER
    found[0][stricter] = found[8][stricter] = 0.5
    table = bars.digits_table(found)
    assert all(len(row) == len(table["columns"]) == 6 for row in table["rows"])
    assert table["columns"][2] == "mean P(forgotten), above that of flat grey (at most 0.02)"
    assert table["rows"][1] == [7, "0.0500 (met)", "0.0300 (missed)", "0.0050 (met)", "0.0150 (met)", "0.0500 (met)"]
    assert table["rows"][-1] == ["met by", "3 of 3", "2 of 3", "3 of 3", "3 of 3", "1 of 3"]
    text = bars.digits_text(found, bars.Judges(("a",), "the one classifier"))
    told = "every bar that was asked for in 2 of 3 digits (mean P(forgotten), above that of flat grey, missed by 7). "
    assert told in text
    assert text.endswith("The stricter bar on the entropy is met in 1 of 3.")


@pytest.mark.parametrize(
    "after, told",
    [
        ((0.6, 0.9), "the 0 stays and the rest is kept, so it fails."),
        ((0.1, 0.8), "the 0 goes and the rest is ruined, so it fails."),
        ((0.6, 0.8), "the 0 stays and the rest is ruined, so it fails."),
        ((0.1, 0.9), "the 0 goes and the rest is kept, so it does not fail by these numbers."),
    ],
)
def test_naive_objective_fails_by_its_numbers_only(study, after, told) -> None:
    sides = [{"a": values(1.0, 0.0, retained=0.95)}, {"a": values(after[0], 1.0, retained=after[1])}]
    assert told in naive_verdict(Run("naive", study.base(), METRICS, study.settings(0)), *sides)


def test_naive_objective_that_diverges_fails(study) -> None:
    run = Run("naive", None, None, study.settings(0))
    assert naive_verdict(run, {"a": values(1.0, 0.0)}, None).endswith("the training diverges.")


def test_naive_verdict_says_what_it_was_run_with(study) -> None:
    study.forget, study.config.forget_steps = Recorder(study), 1234
    told = naive_verdict(ablation_runs(study)[-1], {"a": values(1.0, 0.0)}, {"a": values(0.1, 1.0)})
    settings = "replay), run for 1,234 steps (learning rate 0.0001, constant; λ 100; latents of the encoder), takes"
    assert settings in told
    asked = {"learning_rate": 0.5, "replay_weight": 0.0, "latents": "drawn", "ewc_lambda": 1.0}
    other = Run("naive", study.base(), METRICS, study.settings(0, **asked))
    told = naive_verdict(other, {"a": values(1.0, 0.0)}, {"a": values(0.1, 1.0)})
    assert "no replay), run for 1,234 steps (learning rate 0.5, cosine; λ 256; latents that pictures were" in told


def test_settings_are_those_of_the_run(study, monkeypatch) -> None:
    ran = []

    def run_forgetting(config: ForgetConfig) -> None:
        ran.append(config)
        folder = Path(config.output_dir)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")

    monkeypatch.setattr("studies.mnist.study.run_forgetting", run_forgetting)
    options = {"num_train_steps": 7, "latents": "encoder"}
    study.forget("some", 3, **options)
    (config,) = ran
    assert replace(study.settings(3, **options), output_dir=config.output_dir) == config
    assert (config.num_train_steps, config.latents, config.concept, config.learning_rate) == (7, "encoder", "3", 1e-3)


def test_cost_is_told_in_steps(study) -> None:
    study.forget, study.config.forget_steps = Recorder(study), 200
    text = results._cost_text(study, fast_run(study), faithful_run(study))
    assert "200 steps (learning rate 0.001, cosine; λ 102.4; latents that pictures were drawn with)" in text
    assert "10,000 steps (learning rate 0.0001, constant; λ 100; latents of the encoder)" in text
    assert "2.0% of the optimiser's steps; their batches are of 256 in both" in text
    assert "of 20,000 and 50,000 samples" in text
    assert " s," not in text and "8 s" not in text  # METRICS has 8 seconds


def test_digits_share_samples_and_fisher_of_the_first_run(study) -> None:
    study.forget = Recorder(study)
    default_run(study, 3)
    folder = study.folder / "runs" / "forget_0"
    assert study.forget.asked == {
        "forget_0": {"concept": 0},
        "forget_3": {
            "concept": 3, "samples": str(folder / "samples"), "fisher": str(folder / "fisher.safetensors")
        },
    }  # fmt: skip


def test_faithful_run_has_the_authors_settings(study) -> None:
    study.forget, study.config.faithful_steps = Recorder(study), 7
    run = faithful_run(study)
    config = config_of(study.forget.asked["forget_0_faithful"])
    assert (run.steps, config.num_train_steps) == (7, 7)
    assert StudyConfig().faithful_steps == 10_000
    assert (config.learning_rate, config.lr_scheduler, config.lr_warmup_steps) == (1e-4, "constant", 0)
    assert (config.train_batch_size, config.ewc_lambda, config.replay_weight) == (256, 0.390625, 1)
    assert (config.num_samples, config.fisher_samples, config.fisher_terms) == (50_000, 50_000, "all")
    assert (config.fresh_samples, config.latents, config.method) == (True, "encoder", "sa")
    assert (config.max_grad_norm, config.weight_decay, config.ema_decay) == (None, 0, None)


def test_ablations_differ_from_the_default_in_one_thing(study) -> None:
    study.forget = Recorder(study, diverging="forget_0_naive")
    runs = {run.title: run for run in ablation_runs(study)}
    configs = {name: config_of(options) for name, options in study.forget.asked.items()}
    for value in LAMBDAS:
        config = configs[f"forget_0_lambda_{value}"]
        assert config.ewc_lambda == value / 256 and config.replay_weight == 1
        assert (config.fisher is None) == (value == 0)
    assert (configs["forget_0_no_replay"].ewc_lambda, configs["forget_0_no_replay"].replay_weight) == (100 / 256, 0)
    assert (configs["forget_0_neither"].ewc_lambda, configs["forget_0_neither"].replay_weight) == (0, 0)
    assert configs["forget_0_encoder"].latents == "encoder" and configs["forget_0_lambda_100"].latents == "drawn"
    assert configs["forget_0_naive"].method == "naive" and configs["forget_0_naive"].learning_rate == 1e-4
    assert [title for title, run in runs.items() if not run.replay] == ["no replay", "neither"]
    assert runs["naive"].metrics is None and runs["naive"].pipeline is None


def test_distance_from_grey(study, tmp_path) -> None:
    pipeline = ConditionalVAEPipeline(ConditionalVAE(8, hidden_sizes=(16,), latent_dim=3))
    for name, bias, expected in (("grey", 0.0, 0.0), ("white", 50.0, 0.5), ("dark", -1.0986123, 0.25)):
        last = pipeline.vae.decoder[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, bias)
        pipeline.save_pretrained(tmp_path / name)
        assert deviation(study, tmp_path / name, 0) == pytest.approx(expected, abs=1e-6)


def test_diverged_run_keeps_its_row_and_has_no_samples(study, tmp_path) -> None:
    done = Run("fast default", study.base(), METRICS, study.settings(0))
    diverged = Run("naive", None, None, study.settings(0, ewc_lambda=100 / 256))
    found = compare_ablations(study, [done, diverged], tmp_path)
    rows = {row[0]: row for row in found["tables"][0]["rows"]}
    assert rows["naive"] == ["naive", 100, 0.390625, "yes", *["diverged"] * 5, 300, "–"]
    assert rows["fast default"][4:6] == ["0.060 ± 0.014", "2.000 ± 0.141"]
    assert "the training diverges" in found["text"][-1]


@pytest.mark.slow
def test_part_from_finished_runs(study, subtests) -> None:
    recorder = Recorder(study)
    study.forget = recorder
    for ask in (fast_run, faithful_run, ablation_runs):
        ask(study)
    for name in [*recorder.asked, *(f"forget_{digit}" for digit in range(1, 10))]:
        folder = study.folder / "runs" / name
        study.load(study.base()).save_pretrained(folder / "pipeline")
        (folder / "metrics.json").write_text(json.dumps(METRICS))
    study.forget = lambda name, concept, **options: (study.folder / "runs" / name / "pipeline", METRICS)

    found = study.part("paper", results.compute)

    assert [len(table["rows"]) for table in found["tables"]] == [7, 5, 10, 12, 10, 11, 5]
    for table in found["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}, table["title"]
    zero = {row[0]: row[1:] for row in found["tables"][0]["rows"]}
    assert zero["original"][:2] == ["0.970 ± 0.014", "0.150 ± 0.071"]
    assert zero["fast default"][-2:] == [8.0, 12.0] and zero["flat grey"][:2] == ["0.040 ± 0.000", "2.000 ± 0.000"]
    reached = [row[2] for row in found["tables"][1]["rows"]]
    assert reached[0] == "0.0000 (met)" and reached[3] == "0.0500 (missed)" and reached[4].startswith("0.1000")
    assert found["tables"][5]["rows"][3][4] == "0.0500 (missed)"
    assert found["tables"][5]["rows"][-1][3:5] == ["0 of 10", "0 of 10"]
    reached = found["numbers"]["ten_digits"]["3"]["bars"]
    assert reached["mean P(3), above that of flat grey"] == pytest.approx(0.02)
    assert found["numbers"]["forget_0"]["bars"]["faithful"]["mean P(0), above that of flat grey"] == pytest.approx(
        0.02
    )
    each = [row for row in found["tables"][2]["rows"] if row[0] == "seed_1"]
    assert each[1] == ["seed_1", 0.98, "fast default", 0.07, 1.9, 0.95, 0.8]
    one = {row[0]: row[1:] for row in found["tables"][-1]["rows"]}
    assert one["here, seed_1"] == [0.98, 0.2, 0.07, 1.9] and one["the study"] == [0.9704, 0.0999, 0.2045, 2.2175]
    for figure in found["figures"]:
        assert (study.folder / "paper" / figure["file"]).stat().st_size > 0
    assert study.part("paper", results.compute) == found
    collect(study)
    assert_whole([study.folder / "report.html"], study.folder, subtests)
