"""Runs killed at random moments, or out of room on the disk: going on gives the same bytes and leaves nothing over."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

import sa_diffusers.runs.results
import sa_diffusers.runs.stages.fisher
import sa_diffusers.runs.stages.train
from sa_diffusers.core.fisher import Fisher
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.io.artifacts import Marker, StageMismatch
from sa_diffusers.io.atomic_files import ArtifactError, DiskFull, atomic_path, explain_write_errors, remove_leftovers
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.stages import Stage, Stages
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.inputs import claim_folder
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.checkpoints import Checkpoints


SCRIPT = Path(__file__).parents[2] / "scripts" / "forget.py"
OPTIONS = {
    "concept": "seven, 7", "num_samples": 16, "num_surrogate_samples": 8, "num_inference_steps": 4,
    "sample_batch_size": 2, "guidance_scale": 2.0, "replay_guidance_scale": 2.0, "fisher_samples": 10,
    "fisher_terms": "3", "num_train_steps": 9, "train_batch_size": 2, "learning_rate": 1e-3, "lr_warmup_steps": 0,
    "ema_decay": 0.5, "checkpointing_steps": 2, "eval_batch_size": 8, "num_threads": 1,
}  # fmt: skip
# What holds seconds, the folder's own name, or the random state that accelerate adds and nothing here reads.
UNEQUAL = (
    "metrics.json",
    "report.html",
    "config.yaml",
    ".lock",
    ".stages/*",
    "README.md",
    "checkpoints/*/random_states_0.pkl",
)

# Imports once what takes seconds, then forks a process for every run, which does what the script does.
SERVER = """
import os, runpy, sys, traceback
import sa_diffusers.runs.forget, sa_diffusers.runs.results
print("ready", flush=True)
script, config = sys.argv[1:]
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        sys.argv = [script, "--config", config, *line.split()]
        code = 0
        try:
            with open(os.devnull, "w") as sys.stdout:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    """Starts runs, each a process of its own that can be killed."""

    def __init__(self, config_path: Path):
        command = [sys.executable, "-c", SERVER, SCRIPT, config_path]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments: object) -> int:
        """The number of the new process."""
        print(*arguments, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The run's exit code; minus the signal that ended it."""
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_pipeline_dir) -> dict:
    folder, inks, digits = tmp_path_factory.mktemp("inputs"), ("red", "green"), "six seven eight nine".split()
    prompts = [f"a {ink} {digit}" for ink in inks for digit in digits] + ["a digit"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    (folder / "templates.txt").write_text("a {}\na red {}")
    files = {"replay_prompts": str(folder / "prompts.txt"), "concept_templates": str(folder / "templates.txt")}
    return OPTIONS | files | {"model": str(tiny_pipeline_dir)}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, config) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def server(config_path) -> Iterator[Server]:
    server = Server(config_path)
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=100)


def undisturbed(config_path: Path, folder: Path, *options: str) -> float:
    """A run in a process that shares nothing with the others, not even the seed of hashes; returns its seconds."""
    start = time.monotonic()
    command = [sys.executable, SCRIPT, "--config", config_path, "--output_dir", folder, *options]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return time.monotonic() - start


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name; b"" for those that no two runs have in common byte for byte."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): b"" if any(name.match(pattern) for pattern in UNEQUAL) else path.read_bytes()
        for name, path in files.items()
    }


def assert_same(folder: Path, whole: Path) -> None:
    found, expected = contents(folder), contents(whole)
    assert found.keys() == expected.keys()  # no temporary files left, either
    assert [name for name in expected if found[name] != expected[name]] == []


# Stages, and what in the run's folder says that the run is inside them: a pattern and how many files at most.
MOMENTS = [
    ("samples", "samples/.samples_parts/*.safetensors", 7),
    ("replay_samples", "samples/.without_concept_parts/*.safetensors", 1),
    ("surrogate", "surrogate/.surrogate_parts/*.safetensors", 3),
    ("fisher", ".fisher_parts/*.safetensors", 1),
    ("before", ".stages/fisher.json", 1),
    ("train", "checkpoints/step_*.partial", 1),
    ("train", "checkpoints/step_*[0-9]", 2),
    ("train", ".????????.pipeline", 1),
    ("after", ".stages/train.json", 1),
]


def kill_inside(server: Server, pattern: str, most: int, chance: random.Random, folder: Path, *options: str) -> None:
    """Start a run and kill it a moment after so many files of a pattern have come."""
    pid, count = server.start("--output_dir", folder, *options), chance.randint(1, most)
    end = time.monotonic() + 200
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, f"{pattern} did not come"
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_in_every_stage(server, config_path, tmp_path):
    undisturbed(config_path, tmp_path / "whole")
    chance, run = random.Random(0), tmp_path / "run"
    for stage, pattern, most in MOMENTS:
        kill_inside(server, pattern, most, chance, run)
        assert not (run / ".stages" / f"{stage}.json").exists(), f"{stage} was over before the kill"
    kill_inside(server, ".stages/after.json", 1, chance, run)  # while the page is made
    server.start("--output_dir", run)
    assert server.wait() == 0
    assert_same(run, tmp_path / "whole")


@pytest.mark.slow
def test_a_lora_killed_at_any_time(server, config_path, tmp_path):
    options = ("--lora_rank", "2", "--start", "edit")
    undisturbed(config_path, tmp_path / "whole", *options)
    chance, run, killed, longest = random.Random(0), tmp_path / "run", 0, 0.2
    while True:
        pid = server.start("--output_dir", run, *options)
        time.sleep(chance.uniform(0, longest))
        with suppress(ProcessLookupError):  # it may have reached its end
            os.kill(pid, signal.SIGKILL)
        if server.wait() == 0:
            break
        killed += 1
        longest *= 1.4  # whatever the machine's speed, kills come early, midway and late
    assert killed > 2
    server.start("--output_dir", run, *options)
    assert server.wait() == 0
    assert_same(run, tmp_path / "whole")


def run_forget(config: dict, folder: Path) -> None:
    run_forgetting(config_from_dict(ForgetConfig, config | {"output_dir": str(folder)}))


@contextmanager
def small_files(size: int = 100) -> Iterator[None]:
    """No file may grow beyond so many bytes: this stands for a full disk, in whatever language a library writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS = [
    (SampleSet, "save"),
    (sa_diffusers.runs.stages.fisher, "_save_sums"),
    (Fisher, "save"),
    (Findings, "save"),
    (Checkpoints, "save"),
    (sa_diffusers.runs.stages.train, "save_lora"),
    (sa_diffusers.runs.stages.train, "save_pipeline"),
    (sa_diffusers.runs.results, "save_before_after"),
    (sa_diffusers.runs.results, "write_report"),
    (sa_diffusers.runs.results, "write_model_card"),
]


@pytest.mark.slow
def test_a_full_disk_ends_every_stage_clearly_and_leaves_earlier_results(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sa_diffusers.runs.inputs.LOOKED_AT", 2)
    cheap = {"num_samples": 4, "num_surrogate_samples": 2, "fisher_samples": 2, "num_train_steps": 3, "lora_rank": 2}
    run, done = tmp_path / "run", {}
    for owner, name in WRITERS:
        write = getattr(owner, name)

        def without_room(*arguments, write=write, **options):
            with small_files():
                return write(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(DiskFull, match="No room to write .* --output_dir"):
            patch.setattr(owner, name, without_room)
            run_forget(config | cheap, run)
        found = contents(run)
        assert done.items() <= found.items(), name
        assert not list(run.rglob(".????????.*")) and not list(run.rglob("*.partial")), name
        unfinished = ("parts/", "checkpoints/")
        done = {n: data for n, data in found.items() if data and not any(word in n for word in unfinished)}
    run_forget(config | cheap, run)
    run_forget(config | cheap, tmp_path / "whole")
    assert_same(run, tmp_path / "whole")


def test_other_failures_to_write_are_named_too(tmp_path):
    with pytest.raises(ArtifactError, match="Cannot write .*samples: .*No such file or directory"):
        with atomic_path(tmp_path / "samples") as new:
            save_file({"latents": torch.zeros(1)}, new / "samples.safetensors")
    with pytest.raises(ZeroDivisionError), explain_write_errors(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="out of memory") as caught, explain_write_errors(tmp_path):
        raise RuntimeError("out of memory")
    assert caught.type is RuntimeError


KILL_AT_A_RENAME = """
import os, signal, sys
from sa_diffusers.io.atomic_files import atomic_path

replace = os.replace

for target, number in (("file", 0), ("folder", 0), ("folder", 1), ("folder", 2)):
    if os.fork():
        assert os.wait()[1] == signal.SIGKILL
        continue
    calls = []

    def replace_or_die(*paths):
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(paths)
        replace(*paths)

    os.replace = replace_or_die
    with atomic_path(os.path.join(sys.argv[1], f"{target}_{number}")) as new:
        if target == "folder":
            new.mkdir()
            new = new / "part"
        new.write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_killed_between_writing_and_renaming(tmp_path):
    (tmp_path / "file_0").write_text("old")
    for number in range(3):
        (tmp_path / f"folder_{number}").mkdir()
        (tmp_path / f"folder_{number}" / "part").write_text("old")
    subprocess.run([sys.executable, "-c", KILL_AT_A_RENAME, tmp_path], check=True)
    assert (tmp_path / "file_0").read_text() == "old"
    # Before the old folder is set aside, between that and the new one's turn, and after it.
    assert (tmp_path / "folder_0" / "part").read_text() == "old"
    assert not (tmp_path / "folder_1").exists() and (tmp_path / ".old.folder_1" / "part").read_text() == "old"
    assert (tmp_path / "folder_2" / "part").read_text() == "new"
    assert len(list(tmp_path.glob(".????????.*"))) == 3  # of the last folder the new one is in its place

    remove_leftovers(tmp_path)
    assert list(tmp_path.glob(".????????.*")) == []
    for name in ("folder_0", "folder_1", "folder_2"):
        with atomic_path(tmp_path / name) as new:
            assert (tmp_path / name / "part").exists()
            new.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file_0", "folder_0", "folder_1", "folder_2"]


def test_the_day_of_a_run_is_that_of_its_first_start(tmp_path, monkeypatch):
    first = claim_folder(tmp_path)
    assert abs(date.today() - date.fromisoformat(first)) <= timedelta(days=1)
    monkeypatch.setattr("sa_diffusers.runs.inputs.datetime", None)  # the clock is not asked again
    assert claim_folder(tmp_path) == first


def test_a_folder_half_claimed_can_be_claimed(tmp_path):
    with pytest.raises(DiskFull), small_files(10):
        claim_folder(tmp_path)
    (tmp_path / ".stages" / ".0123abcd.run.json").write_text("{")  # of a process that was killed here
    claim_folder(tmp_path)
    (tmp_path / ".0123abcd.pipeline").mkdir()
    claim_folder(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [".stages", ".stages/run.json"]
    (tmp_path / ".stages" / "run.json").rename(tmp_path / ".stages" / "base.json")
    (tmp_path / ".0123abcd.pipeline").mkdir()
    with pytest.raises(StageMismatch, match="something else"):
        claim_folder(tmp_path)
    assert (tmp_path / ".0123abcd.pipeline").exists()  # nothing is removed from a folder of something else


class SlowWork(Stage[Any]):
    """A stage with a folder of unfinished work, and whatever it is told to do."""

    name = counts_as = "fisher"
    fields = ("seed",)

    def __init__(self, compute: Callable[[], Any]):
        self._compute = compute

    def compute(self, context: Any) -> Any:
        return self._compute()

    def workspace(self, context: Any) -> Path:
        return context.folder / "parts"


def run_slow_work(compute: Callable[[], Any], folder: Path, seed: int) -> Any:
    stage = SlowWork(compute)
    context = SimpleNamespace(options=SimpleNamespace(seed=seed), folder=folder, artifacts={})
    return Stages([stage], context).run(stage)


def test_unfinished_work_outlives_a_full_disk(tmp_path):
    part = tmp_path / "parts" / "first"

    def run(compute: Callable[[], Any]) -> Any:
        return run_slow_work(compute, tmp_path, seed=0)

    def interrupted() -> None:
        part.write_text("hours of work")
        raise KeyboardInterrupt

    def out_of_room() -> None:
        part.with_name("second").write_text("more")

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    with pytest.raises(OSError), small_files(0):
        run(out_of_room)
    assert run(part.read_text) == "hours of work"


def test_unfinished_work_stays_until_its_result_is_vouched_for(tmp_path, monkeypatch):
    def compute() -> str:
        (tmp_path / "parts" / "first").touch()
        return "result"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Marker, "finish", killed)
        run_slow_work(compute, tmp_path, seed=0)
    assert (tmp_path / "parts" / "first").exists()
    assert run_slow_work(compute, tmp_path, seed=0) == "result" and not (tmp_path / "parts").exists()


def test_unfinished_work_of_another_key_is_not_gone_on_with(tmp_path):
    left = tmp_path / "parts" / "first"

    def interrupted() -> None:
        left.write_text("of seed 0")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_slow_work(interrupted, tmp_path, seed=0)
    assert not run_slow_work(left.exists, tmp_path, seed=1)


def test_half_a_checkpoint_is_removed_before_training_goes_on(tmp_path):
    (tmp_path / "step_0000002.partial").mkdir()
    assert Checkpoints(Accelerator(), tmp_path, 1, []).resume() == (0, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equal_fishers_are_equal_files(tmp_path, dtype):
    fisher = Fisher({"größe": torch.ones(2), "b": torch.zeros(3)}, {"model": 'a "\n\x01é', "seed": 0})
    files = set()
    for _ in range(20):
        fisher.save(tmp_path / "fisher.safetensors", dtype)
        files.add((tmp_path / "fisher.safetensors").read_bytes())
    assert len(files) == 1
    with safe_open(tmp_path / "fisher.safetensors", "pt") as file:
        assert len(file.metadata()) > 1
    found = Fisher.load(tmp_path / "fisher.safetensors")
    torch.testing.assert_close(found.tensors, fisher.tensors, rtol=0, atol=0)
    assert found.metadata["model"] == fisher.metadata["model"]
