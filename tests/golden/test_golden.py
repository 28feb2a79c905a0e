"""Same seeds, same numbers: what runs gave when the fixtures beside this file were recorded (see record.py)."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from cases import (
    BASES,
    CLASS_CONDITIONAL,
    CONDITIONAL_VAE,
    DIGITS_RUNS,
    EVALUATED_CLASS,
    FAST,
    GOLDEN,
    HELP,
    STABLE_DIFFUSION,
    flat,
    forget_digits,
    forget_in_class_conditional,
    forget_in_conditional_vae,
    forget_in_stable_diffusion,
    forget_labelled_digits,
    help_of,
    options_in,
    write_inputs,
)


RECORD = os.environ.get("GOLDEN_RECORD") == "1"  # set by record.py: write what is computed in place of comparing it
RTOL, ATOL = 1e-5, 1e-8


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
    compare("methods.json", f"stable_diffusion: {name}", measured)


@pytest.mark.parametrize("name", cases("class_conditional", CLASS_CONDITIONAL))
@pytest.mark.usefixtures("few_pictures")
def test_class_conditional(name, tmp_path):
    compare("methods.json", f"class_conditional: {name}", forget_in_class_conditional(name, tmp_path))


@pytest.mark.parametrize("name", cases("conditional_vae", CONDITIONAL_VAE))
@pytest.mark.usefixtures("few_pictures")
def test_conditional_vae(name, tmp_path):
    compare("methods.json", f"conditional_vae: {name}", forget_in_conditional_vae(name, tmp_path))
