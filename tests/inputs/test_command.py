"""The harness itself, on inputs that any command refuses."""

from pathlib import Path

import pytest
import torch

from sa_diffusers import forget
from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.core.concepts import split_phrasings


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param(["--concept"], ("--concept", "expected one argument"), id="option without its value"),
        pytest.param(["--concept", "a", "--lerning_rate", "1"], ("--lerning_rate", "learning_rate"), id="misspelt"),
        pytest.param(["--concept", "a", "--seed", "one"], ("--seed", "one"), id="word for a number"),
        pytest.param(["--concept", "a", "--config", "none.yaml"], ("none.yaml",), id="no such file"),
    ],
)
def test_refused_at_once(refused, argv, says):
    refused("forget", *argv, says=says)


def test_an_error_that_nobody_foresaw_says_so_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit, match="1"), friendly_errors([]):
        split_phrasings(" , ")
    said = capsys.readouterr().err
    assert said.startswith("error: expected --concept") and "foreseen" not in said
    with pytest.raises(SystemExit, match="1"), friendly_errors([]):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    said = capsys.readouterr().err
    assert "RuntimeError in test_command.py, line " in said and "please report it with what --debug shows" in said
    for bug in (TypeError, KeyError, AttributeError, IndexError):
        with pytest.raises(bug), friendly_errors([]):
            raise bug("ours")


def test_debug_shows_the_traceback(command):
    argv = ("--concept", "seven", "--surrogate", "nine", "--replay_prompts", "none.txt")
    assert command("forget", *argv).message.startswith("error: no file none.txt")
    with pytest.raises(FileNotFoundError, match="no file none.txt"):
        command("forget", *argv, "--debug")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "other/model"}, "expected no model beside a pipeline"),
        ({"dtype": "float16"}, "expected no dtype beside a pipeline, whose own is float32; got 'float16'"),
        ({"surrogate": Path("none")}, "no folder ./none"),
        ({"surrogate": "./none"}, "no folder ./none"),
        ({"surrogate": "nine", "learning_rate": "fast"}, "learning_rate: expected float"),
        ({"surrogate": "nine", "replay_prompts": Path("none.txt")}, "no file none.txt"),
        ({"surrogate": "nine", "lerning_rate": 1.0}, "did you mean 'learning_rate'"),
    ],
)
def test_the_function_refuses_what_it_would_ignore(tiny_pipeline, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        forget(tiny_pipeline(), "seven", **options)


def test_a_path_is_a_folder_of_pictures_whatever_its_name(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three").mkdir()
    with pytest.raises(ValueError, match="no image in ./three"):
        forget(tiny_pipeline(), "seven", Path("three"))
