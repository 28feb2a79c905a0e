"""The wheel holds the package with all of its assets, and nothing else."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement

from sa_diffusers.__main__ import COMMANDS


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sa_diffusers"


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    return listing.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git tracks, so that nothing that lies about in the checkout gets in."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"pyproject.toml builds with setuptools>=77, this environment has {setuptools.__version__}")
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", ".."]
    result = subprocess.run(build, cwd=folder / "source", capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_what_ships_names_commands_that_ship():
    """Scripts, and what is pinned, are in the repository alone."""
    texts = {
        path.relative_to(PACKAGE): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".j2", ".md", ".yaml")
    }
    code = [
        str(path)
        for path, text in texts.items()
        if path.suffix in (".py", ".j2") and re.search("scripts/|constraints.txt", text)
    ]
    assert not code
    scripts = {word.replace("-", "_") for word in COMMANDS} | {"surrogate_distances"}
    named = {(str(path), name) for path, text in texts.items() for name in re.findall(r"scripts/(\w+)\.py", text)}
    assert not [pair for pair in named if pair[1] in scripts]
    words = {word for text in texts.values() for word in re.findall(r"sa-diffusers ([a-z][a-z-]+)", text)}
    assert words and words <= COMMANDS.keys()


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if not name.split("/")[0].endswith(".dist-info")} == {
        name for name in tracked_files() if name.startswith("sa_diffusers/")
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_what_a_run_needs_is_found_in_the_wheel(wheel, tmp_path):
    """By the names that the configurations use, with nothing but the unpacked wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    names = (
        "digits/pipeline/unet/diffusion_pytorch_model.safetensors", "digits/pipeline/tokenizer/tokenizer.json",
        "digits/classifier/diffusion_pytorch_model.safetensors", "digits/replay_prompts.txt",
        "digits/eval_prompts.jsonl", "stable_diffusion/replay_prompts.txt", "surrogates.yaml",
        "stable_diffusion/bare_concept.txt", "stable_diffusion/celebrity_templates.txt",
        "stable_diffusion/nudity_prompts.txt",
    )  # fmt: skip
    code = (
        "import sa_diffusers.report.page; from sa_diffusers.io.bundled import resolve\n"
        f"for name in {names}: print(resolve('bundled/' + name))\n"
        "print(sa_diffusers.report.page.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    *assets, report = map(Path, result.stdout.split())
    assert all(path.is_relative_to(tmp_path) and path.stat().st_size > 0 for path in assets)
    assert (report.parent / "templates" / "report.html.j2").is_file()


@pytest.mark.slow
def test_the_wheel_trains_the_bundled_pipeline_and_its_classifier(wheel, tmp_path):
    """All that their trainings read beside MNIST: architecture, captions, colours, and the forms held out of them."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import os, random, sys, torch, sa_diffusers
from sa_diffusers.data.digits.captions import ATTRIBUTES, fill, held_out_templates
from sa_diffusers.data.digits.images import ColoredDigits
from sa_diffusers.runs.base.classifier import ClassifierConfig, train_and_save_classifier
from sa_diffusers.runs.base.text_to_image import BaseConfig, train_base
coverage = torch.randint(256, (20, len(ATTRIBUTES["stroke"]), 32, 32), dtype=torch.uint8)
digits = ColoredDigits(coverage, torch.arange(20) % 10)
assert len({fill(form, digits.attributes(3), random.Random(0)) for form in held_out_templates()}) > 10
once = {"num_train_steps": 1, "train_batch_size": 2, "checkpointing_steps": None}
parts = {"vae_steps": 1, "vae_batch_size": 2, "text_steps": 1, "text_batch_size": 2}
train_base(digits, BaseConfig(dataset="digits", output_dir="base", **once, **parts))
train_and_save_classifier(ClassifierConfig(dataset="digits8x8", output_dir="judge", disturb=False, **once))
assert sa_diffusers.__file__.startswith(os.getcwd())
assert not [name for name in sys.modules if name.split(".")[0] in ("scripts", "studies")]
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "base" / "pipeline" / "model_index.json").is_file()
    assert (tmp_path / "judge" / "classifier" / "config.json").is_file()


def test_floors_are_of_the_releases_that_the_tests_run_with(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    asked = runpy.run_path(str(ROOT / "setup.py"))
    lines = [*asked["INSTALL_REQUIRES"], *asked["EXTRAS_REQUIRE"]["test"]]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for line in map(Requirement, lines):
        (floor,) = line.specifier
        if line.name != "setuptools":  # builds the wheel: the floor is that of what pyproject.toml says
            assert floor.operator == ">=" and f"{pinned[line.name]}.".startswith(f"{floor.version}."), line


def test_the_citation_has_what_its_format_demands():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= said.keys()
    assert said["authors"] and said["preferred-citation"]["authors"]


SCRIPT = '''"""Forget a concept, follow the run, keep the result."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import sa_diffusers


def follow(event: dict[str, object]) -> bool:
    print(event["event"], event.get("stage"))
    return event["event"] != "error"


def without(concept: str, surrogate: str, folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained("my/model", dtype=torch.float32)
    forgotten = sa_diffusers.forget(pipe, concept, surrogate, output_dir=folder, callback=follow)
    print(forgotten.metrics["verdict"], len(forgotten.pictures))
    return forgotten


fisher = sa_diffusers.load_fisher("runs/seven")
print(len(fisher.tensors), sa_diffusers.__version__)
without("seven, 7", "three", Path("runs/seven")).save_pretrained("without_seven")
'''


@pytest.mark.slow
def test_mypy_takes_a_users_script(tmp_path):
    """What others do not type, and what takes minutes to read, apart: it is our types that are looked at."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*,diffusers.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "script.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
