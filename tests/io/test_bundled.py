"""The bundled pipeline draws what it is asked for, and forgets by the command that the README prints first."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from sa_diffusers.cli.forget import main
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.data.digits.captions import ATTRIBUTES
from sa_diffusers.data.sampling import draw_samples
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.evaluation.judges.classifier import AttributeClassifier
from sa_diffusers.families import get_family
from sa_diffusers.io.bundled import beside, resolve
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
from sa_diffusers.runs.inputs import read_inputs
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.evaluate import SHIPPED
from scripts import benchmark


ROOT = Path(__file__).parents[2]
COLOURS = (("red", "white"), ("green", "black"))  # ink, background
# And a single thread, since another test runs beside.
FEWER_PICTURES = {"eval_images_concept": 60, "eval_images_class": 20, "eval_images_other": 60, "num_threads": 1}


@pytest.fixture(scope="module")
def pipeline_dir() -> Path:
    return Path(resolve("bundled/digits/pipeline"))


def test_it_is_small_and_in_half_precision(pipeline_dir):
    files = [path for path in pipeline_dir.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    weights = [load_file(path) for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    assert {tensor.dtype for part in weights for tensor in part.values() if tensor.is_floating_point()} == {
        torch.float16
    }


def test_stock_diffusers_draws_the_digit_that_is_asked_for(pipeline_dir):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    assert type(pipeline) is StableDiffusionPipeline
    pipeline.set_progress_bar_config(disable=True)
    digits = ATTRIBUTES["digit"]
    prompts = [f"a {ink} {digit} on {ground}" for digit in digits for ink, ground in COLOURS]
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    images = pipeline(
        prompts, num_inference_steps=8, guidance_scale=2.0, generator=generators, output_type="pt"
    ).images
    classifier = AttributeClassifier.from_pretrained(resolve("bundled/digits/classifier"), dtype=torch.float32)
    drawn = classifier.eval().probabilities(images * 2 - 1)["digit"].argmax(1)
    asked = torch.arange(10).repeat_interleave(len(COLOURS))
    assert (drawn == asked).float().mean() >= 0.9


@pytest.mark.parametrize("name, dtype, far", [(SHIPPED[0], None, 1e-3), (SHIPPED[1], torch.bfloat16, 0.1)])
def test_the_evaluation_that_ships_is_of_the_pipeline_and_prompts_that_ship(pipeline_dir, name, dtype, far):
    config = parse_config(ForgetConfig, ["--config", str(ROOT / "configs" / "digits.yaml")])
    found = Findings.load(Path(beside(config.model, name)))
    requests = [one for part in read_inputs(config).sets.values() for one in part.requests]
    assert set(found.drawn) == {one.fingerprint for one in requests}
    family = get_family(load_pipeline(config.model, None, None, "float32"), compute_dtype=dtype)
    assert found.key.get("compute_dtype") == (None if dtype is None else "bfloat16")
    assert found.key["model"] == pipeline_hashes(family.pipeline, family.component)
    some = requests[:: len(requests) // 4]
    drawn = draw_samples(family, some, replace(config.judged, batch_size=4)).latents
    kept = torch.stack([found.drawn[one.fingerprint] for one in some])
    torch.testing.assert_close(kept, drawn, rtol=far, atol=far)  # from another processor
    assert beside(str(pipeline_dir), name) and beside("runs/digits/pipeline", "config.yaml") is None


def readme_command() -> list[str]:
    """The second half of the README's first command, as printed."""
    readme = (ROOT / "README.md").read_text()
    install, forget = re.search(r"```bash\n(.*?)\n```", readme, re.DOTALL).group(1).split(" && ")
    assert install.startswith("pip install")
    return forget.split()


def as_flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow("minutes")
def test_the_first_command_of_the_readme_and_again(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    command = [*readme_command(), *as_flags(FEWER_PICTURES | {"output_dir": folder})]
    command[0] = str(Path(sys.executable).with_name(command[0]))  # the `accelerate` of this environment
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    assert "Concept when asked for" in result.stdout
    assert f"report:   {folder / 'report.html'}" in result.stdout
    assert (
        f"sa-diffusers attack {folder} --original bundled/digits/pipeline --concept 'seven, 7' --classifier "
        in result.stdout
    )
    assert (folder / "report.html").stat().st_size > 10_000
    metrics = json.loads((folder / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert before["num_images"] == after["num_images"] == 60 + 9 * 20 + 2 * 60
    assert before["concept_probability"] >= 0.9
    assert after["concept_probability"] <= 0.1
    assert before["retained_accuracy"] >= 0.9
    assert abs(after["retained_accuracy"] - before["retained_accuracy"]) <= 0.04
    assert type(StableDiffusionPipeline.from_pretrained(folder / "pipeline")) is StableDiffusionPipeline

    monkeypatch.chdir(ROOT)
    main(command[command.index("--config") :])  # again, in this process
    assert "reused: samples, replay_samples, surrogate, fisher, before, train, after" in capsys.readouterr().out
    again = json.loads((folder / "metrics.json").read_text())
    assert (again["before"], again["after"]) == (before, after)


@pytest.mark.slow
def test_benchmark_of_the_fisher(tmp_path, monkeypatch, capsys):
    options = ["--only", "fisher", "--exact_samples", "1", "--samples", "2", "--terms", "4"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *options, "--output_dir", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(row["estimator"], row["evaluations"]) for row in rows] == [
        ("exact, half against half", 1000),
        *((f"2 draws of 4, {scale}", 16) for scale in ("a scale a tensor", "one scale", "unscaled")),
    ]  # fmt: skip
    assert all(-1 <= row[key] <= 1 for row in rows for key in ("pearson", "spearman"))
    assert (tmp_path / "benchmark.md").read_text() in capsys.readouterr().out
