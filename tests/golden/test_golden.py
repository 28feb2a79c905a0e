"""Same seeds, same numbers: what runs gave when the fixtures beside this file were recorded (see record.py)."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from cases import (
    CLASS_CONDITIONAL,
    CONDITIONAL_VAE,
    DIGITS_RUNS,
    FAST,
    GOLDEN,
    HELP,
    LABELLED_RUNS,
    NUM_CLASS,
    NUM_CONCEPT,
    NUM_OTHER,
    STABLE_DIFFUSION,
    flat,
    forget_digits,
    forget_in_class_conditional,
    forget_in_conditional_vae,
    forget_in_stable_diffusion,
    forget_labelled_digits,
    help_of,
    options_in,
    train_classifier,
    write_inputs,
)


RECORD = os.environ.get("GOLDEN_RECORD") == "1"  # set by record.py: write what is computed in place of comparing it
RTOL, ATOL = 1e-5, 1e-8
# The norm of a gradient that is nearly 0, at a distilled surrogate's first step, is half rounding, another on another
# processor; Adam follows its signs, and the penalty is of where that led.
HISTORY = {"/grad_norm/": 1e-6, "/ewc_penalty/": 5e-8}
# A picture at the edge between two classes may be read otherwise on another processor: one of them is let pass in each
# share. An attribute beside the digit is named by half of the prompts or more.
METRICS = {
    "/retained_worst_accuracy": 1 / NUM_CLASS,
    "/retained_accuracy": 1 / (9 * NUM_CLASS),
    "/concept_rate_when_unnamed": 1 / NUM_OTHER,
    "/concept_attribute_accuracy/": 2 / NUM_CONCEPT,
    "/attribute_accuracy/": 2 / (9 * NUM_CLASS),
    "_(probability|entropy|probability_unseen)$": 1e-4,  # means of what the classifier says of a few pictures
}


def compare(file: str, name: str, measured: dict, slack: dict[str, float] | None = None) -> None:
    """Every recorded number is there again; new ones may have come.

    Args:
        slack: the absolute difference that is allowed, by a pattern of the number's name.
    """
    path = GOLDEN / file
    if RECORD:
        record(path, name, measured)
        return
    expected, found = dict(flat(json.loads(path.read_text())[name])), dict(flat(measured))
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        if not isinstance(value, float):
            assert found[key] == value, f"{name}: {key}"
            continue
        atol = next((size for pattern, size in (slack or {}).items() if re.search(pattern, key)), ATOL)
        if key.startswith("history/loss/"):  # a sum whose parts may cancel out: as exact as these
            parts = [part for part in expected if re.fullmatch(rf"history/\w+_loss/{key.split('/')[-1]}", part)]
            atol += RTOL * max((abs(expected[part]) for part in parts), default=0.0)
        torch.testing.assert_close(
            torch.tensor(found[key], dtype=torch.float64), torch.tensor(value, dtype=torch.float64),
            rtol=RTOL, atol=atol, msg=lambda text, key=key: f"{name}: {key}\n{text}",
        )  # fmt: skip


def record(path: Path, name: str, measured: dict) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps(dict(sorted((known | {name: rounded(measured)}).items())), indent=1)
    # Numbers of a list on one line.
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n")


def rounded(value: object) -> object:
    """Floats to 9 digits: far finer than the comparison, and without the noise of the rest."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def cases(kind: str, names: dict) -> list:
    return [pytest.param(name, marks=() if (kind, name) in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", cases("stable_diffusion", STABLE_DIFFUSION))
@pytest.mark.usefixtures("few_pictures")
def test_stable_diffusion(name, tiny_pipeline_dir, inputs, tmp_path):
    measured = forget_in_stable_diffusion(name, tiny_pipeline_dir, inputs, tmp_path / "run")
    compare("methods.json", f"stable_diffusion: {name}", measured, HISTORY)


@pytest.mark.parametrize("name", cases("class_conditional", CLASS_CONDITIONAL))
@pytest.mark.usefixtures("few_pictures")
def test_class_conditional(name, tmp_path):
    compare("methods.json", f"class_conditional: {name}", forget_in_class_conditional(name, tmp_path), HISTORY)


@pytest.mark.parametrize("name", cases("conditional_vae", CONDITIONAL_VAE))
@pytest.mark.usefixtures("few_pictures")
def test_conditional_vae(name, tmp_path):
    compare("methods.json", f"conditional_vae: {name}", forget_in_conditional_vae(name, tmp_path), HISTORY)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGITS_RUNS)
def test_runs_of_the_bundled_pipeline(name, tmp_path):
    compare("runs.json", name, forget_digits(name, tmp_path), METRICS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    return train_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELLED_RUNS)
def test_bases_and_runs_of_8x8_digits(name, classifier, tmp_path):
    compare("runs.json", name, forget_labelled_digits(name, classifier, tmp_path), METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("name", HELP)
def test_options_that_there_were_are_there(name):
    text, path = help_of(name), GOLDEN / "help" / f"{name}.txt"
    if RECORD:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return
    recorded = options_in(path.read_text())
    assert recorded
    assert not recorded - options_in(text)
