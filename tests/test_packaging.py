"""The wheel holds the package with all of its assets, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools


ROOT = Path(__file__).parents[1]


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
