"""The command of the MNIST study: what it refuses before anything is trained."""

import runpy
import sys
from pathlib import Path

import pytest

from sa_diffusers.evaluation.judges.digit_classifier import DigitClassifier
from sa_diffusers.io.hub import ModelLoadError
from studies.mnist.study import Study, StudyConfig


SCRIPT = Path(__file__).parents[3] / "mnist_study.py"


@pytest.mark.parametrize("option", ["classifier", "model"])
def test_what_cannot_be_loaded_is_told_before_training(option, tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "study"
    missing = str(tmp_path / "nowhere")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(folder), f"--{option}", missing])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: '{missing}' is neither a local folder nor a model on the hub")
    assert not folder.exists()


def test_classifiers_are_loaded_by_their_names(tmp_path) -> None:
    names = {"digit": [str(digit) for digit in range(10)]}
    for name in ("a", "b"):
        DigitClassifier(names).save_pretrained(tmp_path / name / "classifier")
    given = [str(tmp_path / name / "classifier") for name in ("a", "b")]
    study = Study(StudyConfig(output_dir=str(tmp_path / "study"), classifier=given))
    study.load_given()
    assert list(study.classifiers) == given
    assert not any(classifier.training for classifier in study.classifiers.values())


def test_a_folder_without_a_classifier_is_named(tmp_path) -> None:
    study = Study(StudyConfig(output_dir=str(tmp_path / "study"), classifier=[str(tmp_path)]))
    with pytest.raises(ModelLoadError, match=f"The folder {tmp_path} cannot be loaded"):
        study.load_given()


def test_what_is_not_given_is_not_made(tmp_path) -> None:
    Study(StudyConfig(output_dir=str(tmp_path / "study"))).load_given()
    assert not (tmp_path / "study").exists()
