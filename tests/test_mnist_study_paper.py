"""Part 1 of the MNIST study: the runs that it asks for, and its tables and verdicts against hand computations."""

import json
from pathlib import Path

import pytest
import torch

from sa_diffusers.cli import config_from_dict
from sa_diffusers.config import ForgetConfig
from sa_diffusers.evaluation.classifier import AttributeClassifier
from sa_diffusers.evaluation.digit_classifier import DigitClassifier
from sa_diffusers.loading import family_defaults
from sa_diffusers.mnist_study import paper
from sa_diffusers.mnist_study.classifier_spread import of_authors_kind, readings, short_names, spread
from sa_diffusers.mnist_study.paper_comparisons import compare_ablations, deviation, naive_verdict
from sa_diffusers.mnist_study.paper_runs import LAMBDAS, Run, ablation_runs, default_run, faithful_run, fast_run
from sa_diffusers.mnist_study.study import Study, StudyConfig
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.training import TrainingDiverged


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
    return config_from_dict(ForgetConfig, family_defaults("ConditionalVAEPipeline") | known)


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
    study.classifiers["wide"] = AttributeClassifier(NAMES, image_size=16, channels=(8,))
    assert of_authors_kind(study) == ["seed_0", "seed_1"]
    study.__dict__["classifiers"] = {"wide": study.classifiers["wide"]}
    assert of_authors_kind(study) == ["wide"]


def test_bars_compare_means_over_the_classifiers(study) -> None:
    found = paper.bars(readings(study, METRICS, "before"), readings(study, METRICS, "after"))
    # Entropies 2.1 and 1.9 have the mean of flat grey, though neither classifier agrees with it.
    assert list(found.values()) == pytest.approx([0.0, 0.06 - 0.04, 0.97 - 0.96, 0.9 - 0.85])


def test_verdict_names_each_bar_that_is_missed() -> None:
    limits = dict(paper.BARS)
    (met,) = paper._bar_text({"fast": limits}, 5)
    assert "meets every bar" in met
    (missed,) = paper._bar_text({"fast": limits | {"mean P(0), above that of flat grey": 0.021}}, 5)
    assert "misses 1 of the 4 bars: mean P(0), above that of flat grey: 0.0210 (at most 0.02)" in missed


@pytest.mark.parametrize(
    "after, told",
    [
        ((0.6, 0.9), "it fails, since the 0 stays."),
        ((0.1, 0.8), "it fails, since the rest is ruined."),
        ((0.6, 0.8), "it fails, since the 0 stays and the rest is ruined."),
        ((0.1, 0.9), "it does not fail by these numbers."),
    ],
)
def test_naive_objective_fails_by_its_numbers_only(after, told) -> None:
    sides = [{"a": values(1.0, 0.0, retained=0.95)}, {"a": values(after[0], 1.0, retained=after[1])}]
    assert naive_verdict(*sides).endswith(told)


def test_naive_objective_that_diverges_fails() -> None:
    assert naive_verdict({"a": values(1.0, 0.0)}, None).endswith("the training diverges.")


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
    assert (config.fresh_samples, config.latents, config.method) == (True, "encoder", "selective_amnesia")
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
    done = Run("fast default", study.base(), METRICS, 102.4, True, 300)
    diverged = Run("naive", None, None, 100, True, 300)
    found = compare_ablations(study, [done, diverged], tmp_path)
    rows = {row[0]: row for row in found["tables"][0]["rows"]}
    assert rows["naive"] == ["naive", 100, 0.390625, "yes", *["diverged"] * 5, 300, "–"]
    assert rows["fast default"][4:6] == ["0.060 ± 0.014", "2.000 ± 0.141"]
    assert "the training diverges" in found["text"][-1]


def test_part_from_finished_runs(study) -> None:
    recorder = Recorder(study)
    study.forget = recorder
    for ask in (fast_run, faithful_run, ablation_runs):
        ask(study)
    for name in [*recorder.asked, *(f"forget_{digit}" for digit in range(1, 10))]:
        folder = study.folder / "runs" / name
        study.load(study.base()).save_pretrained(folder / "pipeline")
        (folder / "metrics.json").write_text(json.dumps(METRICS))
    study.forget = lambda name, concept, **options: (study.folder / "runs" / name / "pipeline", METRICS)

    found = paper.run(study)

    assert [len(table["rows"]) for table in found["tables"]] == [7, 4, 10, 12, 10, 5]
    for table in found["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}, table["title"]
    zero = {row[0]: row[1:] for row in found["tables"][0]["rows"]}
    assert zero["original"][:2] == ["0.970 ± 0.014", "0.150 ± 0.071"]
    assert zero["fast default"][-2:] == [8.0, 12.0] and zero["flat grey"][:2] == ["0.040 ± 0.000", "2.000 ± 0.000"]
    assert found["tables"][1]["rows"][3][2] == "0.0500 (missed)"
    each = [row for row in found["tables"][2]["rows"] if row[0] == "seed_1"]
    assert each[1] == ["seed_1", 0.98, "fast default", 0.07, 1.9, 0.95, 0.8]
    one = {row[0]: row[1:] for row in found["tables"][-1]["rows"]}
    assert one["here, seed_1"] == [0.98, 0.2, 0.07, 1.9] and one["the study"] == [0.9704, 0.0999, 0.2045, 2.2175]
    for figure in found["figures"]:
        assert (study.folder / "paper" / figure["file"]).stat().st_size > 0
    assert paper.run(study) == found
