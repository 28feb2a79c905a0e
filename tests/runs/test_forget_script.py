"""scripts/forget.py as a program: exit codes, messages, signals. A process costs seconds, so those tests are slow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch_in_parts
import pytest
import torch
import yaml
from launch_in_parts import launch_environment
from safetensors.torch import load_file
from torch.testing import assert_close

from sa_diffusers.cli.forget import main
from sa_diffusers.io.artifacts import run_lock


ROOT = Path(__file__).parents[2]
CHEAP = {
    "concept": "seven, 7", "num_samples": 8, "num_surrogate_samples": 4, "num_inference_steps": 2,
    "sample_batch_size": 2, "guidance_scale": 2.0, "replay_guidance_scale": 2.0, "fisher_samples": 3,
    "fisher_terms": "3", "num_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-3, "lr_warmup_steps": 0,
    "checkpointing_steps": 2, "eval_batch_size": 16,
}  # fmt: skip


@pytest.fixture
def command(tmp_path, tiny_pipeline_dir) -> list[str]:
    """A complete command line, of a run that takes a second once it has started."""
    (tmp_path / "prompts.txt").write_text("a red six\na green nine\na blue eight\na seven\na digit")
    (tmp_path / "templates.txt").write_text("a {}\na red {}")
    files = {"replay_prompts": str(tmp_path / "prompts.txt"), "concept_templates": str(tmp_path / "templates.txt")}
    config = CHEAP | files | {"model": str(tiny_pipeline_dir), "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, str(ROOT / "scripts" / "forget.py"), "--config", str(tmp_path / "config.yaml")]


def run(command: list[str], *more: str) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=900)


@pytest.fixture
def refused(command, capsys):
    """Run the command in this process, which ends it with a code and messages."""

    def run_refused(code: int, *messages: str, more: tuple[str, ...] = ()) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*command[2:], *more])
        said = capsys.readouterr().err
        assert ended.value.code == code, said
        assert "Traceback" not in said
        for message in messages:
            assert message in said

    return run_refused


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def heed_ctrl_c() -> None:
    """In a child, before it starts: a suite started with SIGINT ignored (in the background) hands that on to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 200
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, f"it ended before {path} was there: {process.communicate()[1]}"
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def test_unknown_concept(refused, tmp_path):
    refused(1, "error: no surrogate is known for 'a teapot'", "--surrogate", more=("--concept", "a teapot"))
    assert not (tmp_path / "run").exists()


def test_unknown_option(refused):
    refused(2, "did you mean '--learning_rate'?", more=("--learning_rat", "1"))


def test_model_that_cannot_be_loaded(refused, tmp_path, tiny_pipeline):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model" / "tokenizer").iterdir():
        file.unlink()
    refused(1, "has no tokenizer", more=("--model", str(tmp_path / "model")))
    other = ("--model", "CompVis/stable-diffusion-v1-4", "--output_dir", str(tmp_path / "other"))
    refused(1, "the hub cannot be reached", "hf download CompVis/stable-diffusion-v1-4", more=other)


def test_output_folder_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    more = ("--output_dir", str(tmp_path / "file" / "run"))
    refused(1, "Cannot write to the output folder", "--output_dir", more=more)


def test_two_runs_in_one_folder_at_once(refused, tmp_path):
    with run_lock(tmp_path / "run"):
        refused(1, "Another run works in", f"pid {os.getpid()}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_run_prints_plan_table_and_page_and_the_same_command_reuses_it(command, tmp_path):
    first = run(command)
    assert first.returncode == 0, first.stderr
    assert "Plan for" in first.stdout
    assert "Loss on replay samples" in first.stdout
    assert str(tmp_path / "run" / "report.html") in first.stdout
    second = run(command)
    assert second.returncode == 0, second.stderr
    assert "reused: samples, replay_samples, surrogate, fisher, before, train, after" in second.stdout


@pytest.mark.slow
def test_a_signal_ends_it_and_the_same_command_goes_on(command, tmp_path):
    """Twice: while samples are drawn, and in training."""
    longer = ["--num_train_steps", "60", "--num_samples", "200"]
    for number, code, word, moment in (
        (signal.SIGTERM, 143, "terminated", "samples/.samples_parts/*.safetensors"),
        (signal.SIGINT, 130, "interrupted", "checkpoints/step_0000002"),
    ):
        process = subprocess.Popen(
            [*command, *longer], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
        )
        wait_for(tmp_path / "run" / moment, process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == code, stderr
        assert f"{word}. Run the same command again to continue." in stderr
        assert "Traceback" not in stderr
        assert not (tmp_path / "run" / "pipeline").exists()
    assert run(command, *longer).returncode == 0
    assert run(command, *longer, "--output_dir", str(tmp_path / "whole")).returncode == 0
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.slow
def test_sigterm_twice_ends_without_a_traceback(command, tmp_path):
    process = subprocess.Popen([*command, "--num_samples", "200"], stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "samples" / ".samples_parts" / "*.safetensors", process)
    process.terminate()
    process.terminate()
    _, stderr = process.communicate(timeout=100)
    assert process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help")
def test_a_run_ends_with_the_launcher_that_started_it(command, tmp_path):
    """Killed, `accelerate launch` tells its child nothing, which would go on and hold the folder."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    process = subprocess.Popen(
        [*launch, *command[1:], "--num_samples", "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "run" / "samples" / ".samples_parts" / "*.safetensors", process)
    process.kill()
    stderr = process.communicate(timeout=100)[1]  # ends when the child does, which holds the pipe, too
    assert "terminated. Run the same command again" in stderr
    with run_lock(tmp_path / "run"):
        assert not (tmp_path / "run" / ".stages" / "samples.json").exists()


ROBUST = (
    "--robust_weight 2 --robust_every 2 --robust_steps 2 --robust_samples 4 --robust_groups 2 "
    "--replay_negative mixture --train_batch_size 8 --num_surrogate_samples 12"
).split()
TRACKED = ["--report_to", "tensorboard"]  # a tracker that ends must leave the processes together
SHARED = ("samples/samples", "surrogate/surrogate", "fisher")


def largest(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.abs().max() for tensor in tensors.values()]).max()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ROBUST, TRACKED], ids=["plain", "robust", "tracked"])
def test_two_processes_give_what_one_gives(more, command, tmp_path):
    if more == TRACKED:
        pytest.importorskip("tensorboard")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, *command[1:], *more], capture_output=True, text=True, timeout=900, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Plan for") == 1  # two that know nothing of each other would print two
    assert run(command, *more, "--output_dir", str(tmp_path / "one")).returncode == 0
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-5)
    two, one = ({n: load_file(tmp_path / r / f"{n}.safetensors") for n in SHARED} for r in ("run", "one"))
    for name in SHARED:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5 * float(largest(one[name])))
    histories = [json.loads((tmp_path / r / "history.json").read_text()) for r in ("run", "one")]
    for row, expected in zip(*histories, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_two_processes_with_a_part_of_the_adapter_each_forget_as_one_with_all(command, tmp_path):
    lora = ["--lora_rank", "3", "--lora_targets", "attention+conv", "--ewc_lambda", "100"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", launch_in_parts.__file__]
    environment = launch_environment("fsdp2", mixed_precision="no") | {"ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [sys.executable, *launch, *command[2:], *lora], check=True, timeout=600,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run(command, *lora, "--output_dir", str(tmp_path / "one")).returncode == 0
    two, one = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("run", "one"))
    assert_close(two, one, rtol=1e-2, atol=1e-4)  # Adam makes much of rounding where a gradient is next to nothing
    histories = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("run", "one"))
    for row, expected in zip(*histories, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert expected["ewc_penalty"] > 0
