"""Part 2 of the MNIST study: what each round starts from and replays, and what its tables make of the readings."""

import json
from pathlib import Path

import pytest
import torch

from sa_diffusers.evaluation.judges.classifier import entropies
from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.families import family_defaults
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig
from studies.mnist.sequential import turns
from studies.mnist.sequential.rounds import (
    CHAIN,
    DIGITS,
    IMPROVED,
    PLAIN,
    Round,
    examine,
    forget_in_turn,
    retained,
    stage_names,
)
from studies.mnist.study import Study, StudyConfig, draw, read


NAMES = {"digit": [str(digit) for digit in range(10)]}


@pytest.fixture
def study(tmp_path) -> Study:
    """A study with an untrained model of 8x8 pixels and two untrained classifiers; forgetting leaves other weights."""

    def save(folder: Path) -> Path:
        if not folder.exists():
            ConditionalVAEPipeline(ConditionalVAE(8, hidden_sizes=(16,), latent_dim=3)).save_pretrained(folder)
        return folder

    torch.manual_seed(0)
    model = save(tmp_path / "base" / "pipeline")
    study = Study(StudyConfig(output_dir=str(tmp_path / "study"), model=str(model), num_images=6, num_threads=1))
    small = {"image_size": 8, "kernel_size": 3, "padding": 1, "channels": (4, 4), "num_features": 8}
    study.__dict__["classifiers"] = {f"runs/seed_{i}/classifier": DigitClassifier(NAMES, **small) for i in range(2)}
    study.asked = {}

    def forget(name: str, concept: int, **options) -> tuple[Path, dict]:
        study.asked[name] = options | {"concept": concept}
        return save(study.folder / "runs" / name / "pipeline"), {}

    study.forget = forget
    return study


def round_of(own: float, distances: list[float], entropies: float = 0.5) -> Round:
    """Of two classifiers, where the second gives every digit asked for .1 more, but neither anything to the 0."""
    matrices = []
    for probability in (own, own + 0.1):
        matrix = torch.full((10, 10), (1 - probability) / 9)
        matrix.fill_diagonal_(probability)
        matrix[0] = torch.tensor([0.0, 1.0] + [0.0] * 8)
        matrices.append(matrix)
    accuracies = torch.stack([torch.full((10,), 0.8), torch.full((10,), 0.9)])
    accuracies[:, 0] = 0
    return Round(torch.stack(matrices), torch.full((2, 10), entropies), accuracies, torch.tensor(distances))


def test_retained_digits_are_those_not_yet_forgotten() -> None:
    assert retained(0, 10) == list(range(10))
    assert retained(2, 10) == list(range(2, 10))
    assert retained(5, 10) == [5, 6, 7, 8, 9]
    assert stage_names() == [
        "original", "without 0", "without 0–1", "without 0–2", "without 0–3", "without 0–4"
    ]  # fmt: skip


@pytest.mark.parametrize("variant", [PLAIN, IMPROVED])
def test_each_round_starts_from_the_last_one(study, tmp_path, variant) -> None:
    pipelines = forget_in_turn(study, variant, tmp_path)
    runs = list(study.asked.items())
    assert [options["concept"] for _, options in runs] == list(DIGITS)
    assert runs[0] == ("forget_0", {"concept": 0})  # shared by both variants
    assert [options["model"] for _, options in runs[1:]] == pipelines[1:-1]
    assert pipelines[0] == study.base() and len(set(pipelines)) == 6


def test_with_memory_each_run_goes_on_after_the_last_one(study, tmp_path) -> None:
    pipelines = forget_in_turn(study, CHAIN, tmp_path)
    runs = list(study.asked.values())
    assert [options["concept"] for options in runs] == list(DIGITS) and runs[0] == {"concept": 0}
    assert [options["after"] for options in runs[1:]] == [str(path.parent) for path in pipelines[1:-1]]
    assert not any("model" in options for options in runs)  # of which each run finds the original


@pytest.mark.slow
def test_the_package_forgets_all_digits_of_the_chain(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    model = tmp_path / "base" / "pipeline"
    ConditionalVAEPipeline(ConditionalVAE(8, hidden_sizes=(16,), latent_dim=3)).save_pretrained(model)
    config = StudyConfig(output_dir=str(tmp_path / "study"), model=str(model), num_images=2, num_threads=1)
    config.forget_steps, small = 2, {"image_size": 8, "kernel_size": 3, "padding": 1}
    DigitClassifier(NAMES, **small, channels=(4, 4), num_features=8).save_pretrained(tmp_path / "classifier")
    config.classifier = [str(tmp_path / "classifier")]
    monkeypatch.setattr("studies.mnist.sequential.rounds.DIGITS", DIGITS[:3])
    monkeypatch.setattr("sa_diffusers.runs.results.write_report", lambda path, **_: path.write_text("<html></html>"))
    study = Study(config)
    settings, few = study.settings, {"num_samples": 20, "num_surrogate_samples": 4, "fisher_samples": 4}
    study.settings = lambda concept, **options: settings(concept, **few | options)
    last = forget_in_turn(study, CHAIN, tmp_path)[-1]
    assert [record["concept"] for record in read_forgotten(str(last))] == ["0", "1", "2"]
    metrics = json.loads((last.parent / "metrics.json").read_text())
    assert [link["concept"] for link in metrics["chain"]] == ["0", "1"]


def test_plain_rounds_know_nothing_of_digits_already_forgotten(study, tmp_path) -> None:
    forget_in_turn(study, PLAIN, tmp_path)
    defaults = family_defaults("ConditionalVAEPipeline")
    for number, options in enumerate(study.asked.values()):
        known = {k: str(v) for k, v in options.items()}
        config = config_from_dict(ForgetConfig, defaults | {"surrogate": "noise"} | known)
        # The prompts of the Fisher; the concept among them is not replayed.
        assert read_inputs(config, lambda: NAMES["digit"]).prompts == NAMES["digit"][number:]


def test_improved_rounds_replay_every_digit(study, tmp_path) -> None:
    forget_in_turn(study, IMPROVED, tmp_path)
    assert family_defaults("ConditionalVAEPipeline")["replay_prompts"] == "labels"
    assert not any("replay_prompts" in options for options in study.asked.values())


def test_examine_against_one_picture_at_a_time(study) -> None:
    first = next(iter(study.classifiers.values()))
    torch.nn.init.constant_(first.heads["digit"].bias[7:8], 3.0)  # so that some picture is read right
    found = examine(study, study.base())
    pipeline = study.load(study.base())
    for digit in (0, 7):
        images = draw(pipeline, digit, 6, 0)
        assert found.distances[digit].item() == pytest.approx(sum((x - 0.5).abs().mean() for x in images).item() / 6)
        for index, classifier in enumerate(study.classifiers.values()):
            readings = [read(classifier, image[None])[0] for image in images]
            torch.testing.assert_close(found.probabilities[index, digit], torch.stack(readings).mean(0))
            each = [entropies(p[None]).item() for p in readings]
            assert found.entropies[index, digit].item() == pytest.approx(sum(each) / 6)
            right = [p.argmax().item() == digit for p in readings]
            assert found.accuracies[index, digit].item() == pytest.approx(sum(right) / 6)
    assert found.probabilities.shape == (2, 10, 10) and found.accuracies[0, 7] == 1
    torch.testing.assert_close(found.own[1, 7], found.probabilities[1, 7, 7])


def test_every_digit_is_drawn_from_the_same_latents(study) -> None:
    pipeline = study.load(study.base())
    first = pipeline.vae.decoder[0]
    with torch.no_grad():
        first.weight[:, 3:] = 0  # the condition
    torch.testing.assert_close(draw(pipeline, 2, 4, 0), draw(pipeline, 9, 4, 0))


def test_tables_of_rounds() -> None:
    grey = [[0.4] * 10 for _ in range(6)]
    for number in range(1, 6):
        for digit in range(number):
            grey[number][digit] = 0.01 * number
    grey[5][1] = 0.3
    rounds = {PLAIN: [round_of(0.8, distances) for distances in grey]}

    rows = turns._rounds_table(rounds)["rows"]
    # 9 of 10 digits at .8 and .9; all 9 of them once the 0 is forgotten.
    assert rows[0] == [PLAIN, "original", "0.765 ± 0.064", "0.765 ± 0.064", "0.000 ± 0.000", "–", "–", "–"]
    assert rows[1][2:7] == ["0.850 ± 0.071"] * 3 + ["0.000 ± 0.000", "0.500 ± 0.000"]
    assert rows[2][5] == "0.425 ± 0.035"
    assert [row[-1] for row in rows[1:]] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.3])

    by_digit = turns._grey_table(rounds)["rows"]
    assert [row[2:5] for row in by_digit] == [
        pytest.approx([0.4, 0.01 * number, 0.3 if number == 2 else 0.05]) for number in range(1, 6)
    ]


def test_text_says_which_digits_came_back() -> None:
    grey = [round_of(0.8, [0.02] * 10) for _ in range(6)]
    assert "all of them are grey at the end" in turns._variant_text(PLAIN, grey)
    back = [*grey[:-1], round_of(0.8, [0.02, 0.02, 0.1, 0.02, 0.3, *[0.02] * 5])]
    told = turns._variant_text(PLAIN, back)
    # The 4 is the last to go: it had no time to come back.
    assert "not grey at the end: 2." in told
    assert "is 0.020 after their own round and 0.040 after the last" in told


@pytest.mark.slow
def test_part(study) -> None:
    found = study.part("sequential", turns.compute)
    for table in found["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}, table["title"]
    assert found["tables"][0]["rows"][0] == ["the study", 0.9133, 0.9252, 0.9315, 0.9306, 0.9270, 0.9193]
    for figure in found["figures"]:
        assert (study.folder / "sequential" / figure["file"]).stat().st_size > 0
    for variant in (PLAIN, IMPROVED):
        for number in found["numbers"][variant]:
            assert [sum(row) for row in number["probabilities"]] == pytest.approx([1] * 10)
    chain = study.part("chain", turns.compute_chain)
    assert chain["numbers"][PLAIN] == found["numbers"][PLAIN] and set(chain["numbers"]) == {PLAIN, CHAIN}
    assert all((study.folder / "chain" / figure["file"]).stat().st_size > 0 for figure in chain["figures"])
    assert any("--after" in told for told in chain["text"])
    # Both variants share the original and the first round; later rounds are models of their own.
    plain, improved = (found["numbers"][variant] for variant in (PLAIN, IMPROVED))
    assert plain[:2] == improved[:2] and plain[2] != improved[2]
    assert found["tables"][0]["rows"][1][1] == plain[0]["by_classifier"]["seed_0"]["probabilities"][9][9]
