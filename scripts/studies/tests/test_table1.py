"""Table 1: its rows are made once, judged alike and written side by side; the command that makes it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.labelled_images import load_labelled_images
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.evaluation.examination import examination, labelled_classes
from sa_diffusers.evaluation.images.metrics import frechet_distance
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import family_defaults, get_family
from sa_diffusers.families.architectures import make_unet
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs.base.labelled import ClassConditionalConfig
from sa_diffusers.runs.forget import run_forgetting
from scripts import paper_table
from studies.table1.table import Table, judge_row, make_table, markdown, mean_and_spread, read_rows, run_row


ROOT = Path(__file__).parents[3]
FILES = ("table1.json", "table1.md", "samples.png", "curves.png")
BASE = {
    "family": "class_conditional", "dataset": "digits8x8", "block_out_channels": [4, 8], "layers_per_block": 1,
    "attention_resolutions": [4], "norm_num_groups": 2, "dropout": 0.0, "flip": False, "num_train_steps": 2,
    "train_batch_size": 64, "checkpointing_steps": 2,
}  # fmt: skip
FORGET = {
    "concept": "0", "surrogate": "noise", "ewc_lambda": 0.01, "num_samples": 20, "num_surrogate_samples": 4,
    "num_inference_steps": 2, "sampler": "ddim", "fisher_samples": 4, "fisher_terms": "2", "num_train_steps": 2,
    "train_batch_size": 4, "checkpointing_steps": 2, "eval_batch_size": 40,
}  # fmt: skip
ROWS = {
    "original": BASE,
    "nine_classes": BASE | {"exclude_classes": ["0"]},
    "lambda_10": FORGET,
    "no_replay": FORGET | {"replay_weight": 0.0},
    "replay_500": FORGET | {"num_samples": 10},
}


REDUCED_BASE = {
    "block_out_channels": [16, 32], "attention_head_dim": 8, "norm_num_groups": 4, "num_train_steps": 700,
    "train_batch_size": 64, "learning_rate": 2e-3, "lr_warmup_steps": 50, "checkpointing_steps": 350,
}  # fmt: skip
REDUCED = {
    "ewc_lambda": 0.001, "num_samples": 400, "num_surrogate_samples": 20, "fisher_samples": 60,
    "num_train_steps": 100, "train_batch_size": 32, "learning_rate": 1e-3, "track_steps": 100,
}  # fmt: skip


def save_judges(folder: Path) -> list[str]:
    names = {"digit": [str(digit) for digit in range(10)]}
    for seed in range(2):
        torch.manual_seed(seed)
        classifier = DigitClassifier(names, image_size=8, kernel_size=3, padding=1, accuracy={"digit": 0.5})
        classifier.save_pretrained(folder / f"judge_{seed}")
    return [str(folder / f"judge_{seed}") for seed in range(2)]


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """A run's own evaluation and page take most of the time of runs this small, and the table reads neither."""
    few = {"eval_images_concept": 2, "eval_images_class": 1, "track_images": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.table1.table.run_forgetting", lambda config: run_forgetting(replace(config, **few)))
        patch.setattr("sa_diffusers.runs.results.write_report", lambda path, **_: path.write_text("<html></html>"))
        yield


@pytest.fixture(scope="module")
def made(few_pictures, tmp_path_factory) -> tuple[Table, str]:
    """A table of five rows; do not change its folder but at the end."""
    folder = tmp_path_factory.mktemp("table")
    table = Table(ROWS, folder / "tiny", save_judges(folder), images_concept=6, images_per_class=2)
    return table, make_table(table)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("studies.table1.table.draw_figures", lambda *_: None)


def again(table: Table, **changes) -> Table:
    """The same table by another process."""
    given = {name: getattr(table, name) for name in Table.__dataclass_fields__}
    return Table(**given | changes)


def times(folder: Path, *patterns: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern)}


@pytest.mark.slow
def test_a_table_is_written_with_a_line_a_row(made):
    table, text = made
    for name in FILES:
        assert (table.folder / name).stat().st_size > 100
    assert (table.folder / "table1.md").read_text() == text
    *lines, _, said = text.strip().split("\n")
    assert said == "Held-out real images that the 2 classifier(s) read right: 0.500 ± 0.000."
    titles = [line.split("|")[1].strip() for line in lines]
    assert titles == [
        "row", "---", "original", "never saw the class", "SA, λ = 0.01", "no replay, λ = 0.01",
        "SA, 500 replay samples, λ = 0.01", "held-out real images", "pure noise",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1
    result = json.loads((table.folder / "table1.json").read_text())
    assert markdown(result) == text
    found = result["rows"]
    assert list(found) == list(ROWS)
    for row in found.values():
        assert [row["num_images"][kind] for kind in ("concept", "retained", "real")] == [6, 18, 18]
        assert row["steps"] == 2
        assert set(row["by_classifier"]) == set(table.classifiers)
        for judged in row["by_classifier"].values():
            assert judged["classifier_accuracy"] == 0.5
            assert 0 <= judged["concept_probability"] <= 1 and 0 <= judged["noise_probability"] <= 1
    assert found["original"]["seconds"] is None and found["lambda_10"]["seconds"]["train"] > 0
    assert Image.open(table.folder / "samples.png").size[0] > 500
    values = [j["concept_probability"] for j in found["lambda_10"]["by_classifier"].values()]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    assert mean_and_spread(found["lambda_10"], "concept_probability") == f"{mean:.3f} ± {spread:.3f}"
    assert f"| {mean:.3f} ± {spread:.3f} |" in lines[4]


@pytest.mark.slow
def test_rows_share_the_samples_and_the_fisher_of_the_reference(made):
    table, _ = made
    config = yaml.safe_load((table.folder / "no_replay" / "config.yaml").read_text())
    assert config["samples"] == str(table.folder / "lambda_10" / "samples")
    assert config["fisher"] == str(table.folder / "lambda_10" / "fisher.safetensors")
    assert not (table.folder / "no_replay" / "fisher.safetensors").exists()
    assert config["model"] == str(table.folder / "original" / "pipeline") and config["replay_weight"] == 0
    assert config["classifier"] == table.classifiers[:1]
    own = yaml.safe_load((table.folder / "replay_500" / "config.yaml").read_text())
    assert own["samples"] is None and own["fisher"] == config["fisher"]
    assert len(SampleSet.load(table.folder / "replay_500" / "samples" / "samples.safetensors")) == 10


@pytest.mark.slow
def test_a_model_that_never_saw_the_class_keeps_its_label(made):
    table, _ = made
    torch.manual_seed(derive_seed(0, "unet"))
    untrained = make_unet(config_from_dict(ClassConditionalConfig, BASE), 8, 1, 10).class_embedding.weight
    for name, shown in (("original", True), ("nine_classes", False)):
        loaded = load_pipeline(str(table.folder / name / "pipeline"), None, None, "float32")
        assert loaded.labels == [str(digit) for digit in range(10)]
        changed = (loaded.unet.class_embedding.weight != untrained).any(1)
        assert changed[1:10].all() and changed[0] == shown


@pytest.mark.slow
def test_the_numbers_are_those_of_the_pictures_of_a_slow_loop(made):
    """The Frechet distance on the first classifier's features, of images drawn one at a time."""
    table, _ = made
    found = json.loads((table.folder / "table1.json").read_text())["rows"]["lambda_10"]
    judge = load_classifier(table.classifiers[0])
    family = get_family(
        load_pipeline(str(table.folder / "lambda_10" / "pipeline"), None, None, "float32"), sampler="ddim"
    )
    concept = find_concept("0", "noise")
    own = ClassifierJudge(judge, *judge.require_class(["0"]))
    exam = examination(own, Concepts([concept]), labelled_classes(own, family.labels), 6, 2, 0, table.seed)
    guidance = family_defaults("ClassConditionalPipeline")["guidance_scale"]
    images = torch.cat(
        [
            family.decode(family.draw([r.condition], [r.seed], guidance, 2))
            for r in exam["concept"].requests + exam["retained"].requests
        ]
    )
    probability = judge.probabilities(images[:6])["digit"][:, 0].mean().item()
    assert found["by_classifier"][table.classifiers[0]]["concept_probability"] == pytest.approx(probability, rel=1e-3)
    right = [
        judge.probabilities(image[None])["digit"].argmax(1).item() == int(request.condition.text)
        for image, request in zip(images[6:], exam["retained"].requests, strict=True)
    ]
    accuracy = found["by_classifier"][table.classifiers[0]]["retained_accuracy"]
    assert accuracy == pytest.approx(sum(right) / 18)

    data = load_labelled_images("digits8x8", None, "train")
    with torch.no_grad():
        known = judge.features((2 * data.sample((data.labels != 0).nonzero()[:, 0]) - 1).expand(-1, 3, -1, -1))
        generated = judge.features(images[6:])
    real = table.trained_on
    assert real.shape == (18, 50)
    assert torch.cdist(real, known, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-4
    distance = frechet_distance(real=real, generated=generated)
    assert found["frechet_distance"] == pytest.approx(distance, rel=1e-2)
    with safe_open(table.folder / "lambda_10" / "table1.safetensors", "pt") as file:
        shown = file.get_tensor("concept").float() / 127.5 - 1
    assert_close(shown, images[:6], rtol=0, atol=1.1 / 127.5)


@pytest.mark.slow
def test_a_second_call_trains_draws_and_judges_nothing(made, no_figures, monkeypatch):
    table, text = made
    patterns = ("*/pipeline/unet/*", "*/table1.safetensors", "*/fisher.safetensors", "*/samples/*", "*/evaluation/*")
    before = times(table.folder, *patterns)
    assert len(before) >= 5 + 5 + 1 + 2 + 4
    for name in ("train_class_conditional", "draw_sets", "measure"):
        monkeypatch.setattr(f"studies.table1.table.{name}", None)  # calling it would raise
    monkeypatch.setattr("sa_diffusers.runs.stages.train.train", None)
    monkeypatch.setattr("sa_diffusers.runs.stages.samples.draw_samples", None)
    assert make_table(again(table)) == text
    assert times(table.folder, *patterns) == before


@pytest.mark.slow
def test_a_changed_row_is_made_again_and_the_others_stay(made, no_figures):
    table, _ = made
    before = times(table.folder, "*/pipeline/unet/*.safetensors", "*/table1.safetensors", "*/fisher.safetensors")
    rows = ROWS | {"no_replay": ROWS["no_replay"] | {"learning_rate": 1e-2}}
    text = make_table(again(table, rows=rows))
    after = times(table.folder, "*/pipeline/unet/*.safetensors", "*/table1.safetensors", "*/fisher.safetensors")
    changed = {path for path in before if before[path] != after[path]}
    assert {path.relative_to(table.folder).parts[0] for path in changed} == {"no_replay"}
    assert len(changed) == 2 and "no replay" in text
    # What depends on the reference is made again with it, though its own file says nothing else.
    rows |= {"lambda_10": FORGET | {"fisher_terms": "3"}}
    make_table(again(table, rows=rows))
    last = times(table.folder, "*/pipeline/unet/*.safetensors", "*/table1.safetensors", "*/fisher.safetensors")
    changed = {path.relative_to(table.folder).parts[0] for path in after if after[path] != last[path]}
    assert changed == {"lambda_10", "no_replay", "replay_500"}


@pytest.mark.slow
def test_rows_that_are_not_asked_for_stay_in_the_table(made, no_figures):
    table, _ = made
    text = make_table(table)  # tests before this one may have made rows again
    before = json.loads((table.folder / "table1.json").read_text())
    few = {name: ROWS[name] for name in ("original", "lambda_10")}
    assert make_table(again(table, rows=few)) == text
    assert json.loads((table.folder / "table1.json").read_text()) == before
    # Of other counts or classifiers they would be another table's.
    fewer = make_table(again(table, rows=few, images_concept=3))
    assert "never saw the class" not in fewer and "| original |" in fewer
    make_table(table)


@pytest.mark.slow
def test_a_base_model_of_another_configuration_is_refused(made):
    table, _ = made
    for name in ("original", "nine_classes"):
        rows = ROWS | {name: ROWS[name] | {"learning_rate": 0.5}}
        with pytest.raises(StageMismatch, match=r"learning_rate: .* -> 0.5"):
            run_row(again(table, rows=rows), name)


@pytest.mark.slow
def test_other_classifiers_and_counts_are_judged_anew(made):
    table, _ = made
    folder, one = table.folder / "original" / "pipeline", again(table, classifiers=table.classifiers[1:])
    found = judge_row(one, "original", folder)
    assert list(found["by_classifier"]) == one.classifiers
    (judged,) = found["by_classifier"].values()
    assert mean_and_spread(found, "concept_entropy") == f"{judged['concept_entropy']:.3f}"  # one has no spread
    fewer = judge_row(again(one, images_concept=3), "original", folder)
    assert fewer["num_images"]["concept"] == 3


def test_rows_come_in_the_order_of_the_paper_and_unknown_ones_last(tmp_path):
    for name in ("another", "no_replay", "lambda_100", "lambda_10", "nine_classes", "original"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"concept": "0"}))
    assert list(read_rows(tmp_path)) == ["original", "nine_classes", "lambda_10", "lambda_100", "no_replay", "another"]
    (tmp_path / "lambda_10.yaml").unlink()
    with pytest.raises(ValueError, match="expected the rows original.yaml and lambda_10.yaml in"):
        read_rows(tmp_path)


@pytest.mark.parametrize("scale", ["digits8x8", "full"])
def test_the_script_refuses_unknown_rows_before_it_trains(scale, tmp_path, monkeypatch, capsys):
    arguments = ["paper_table.py", "table1", "--scale", scale, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--rows", "no_replay,lambda_7"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        paper_table.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "no row lambda_7 in" in message and "'lambda_100'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow("minutes")
def test_the_script_makes_the_table_of_small_digits(tmp_path, monkeypatch, capsys):
    """What the paper claims, in reduced form: forgotten down to what noise reads as, the rest kept, by replay."""
    for name, changes in (("original", REDUCED_BASE), ("lambda_10", REDUCED), ("no_replay", REDUCED)):
        row = yaml.safe_load((ROOT / "configs" / "paper" / "table1" / "digits8x8" / f"{name}.yaml").read_text())
        path = tmp_path / "configs" / "digits8x8" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(row | changes))
    arguments = {
        "--configs": tmp_path / "configs", "--output_dir": tmp_path / "out", "--num_classifiers": 1,
        "--images_concept": 100, "--images_per_class": 20, "--num_threads": 1,
    }  # fmt: skip
    flags = [str(part) for pair in arguments.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["paper_table.py", "table1", "--scale", "digits8x8", *flags])
    monkeypatch.chdir(ROOT)
    paper_table.main()
    folder = tmp_path / "out" / "digits8x8"
    assert (folder / "table1.md").read_text() in capsys.readouterr().out
    found = json.loads((folder / "table1.json").read_text())["rows"]
    before, after, alone = (
        next(iter(found[name]["by_classifier"].values())) for name in ("original", "lambda_10", "no_replay")
    )
    assert before["classifier_accuracy"] > 0.95
    assert before["concept_probability"] > 0.9 and before["retained_accuracy"] > 0.9
    assert after["concept_probability"] < before["noise_probability"] + 0.1
    assert after["retained_accuracy"] > 0.9
    assert alone["retained_accuracy"] <= after["retained_accuracy"]
    assert found["no_replay"]["frechet_distance"] > 1.2 * found["lambda_10"]["frechet_distance"]
