"""Output folders: whole files only, one run at a time, no mixing of configurations."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sa_diffusers.attacks.found import FoundEmbedding, FoundText
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.io.artifacts import Marker, RunFolderBusy, StageMismatch, fingerprint, hash_tensors, run_lock
from sa_diffusers.io.atomic_files import (
    ArtifactError,
    DamagedFile,
    DiskFull,
    atomic_path,
    check_disk,
    load_tensors,
    save_tensors,
    write_json,
)


HOLD_LOCK = """
import sys
from sa_diffusers.io.artifacts import run_lock
with run_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, **files: str) -> None:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)


def test_atomic_file_appears_whole_and_keeps_its_suffix(tmp_path):
    target = tmp_path / "deep" / "picture.png"
    with atomic_path(target) as new:
        assert new.parent == target.parent and new.suffix == ".png"
        new.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["picture.png"]


def test_crash_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "numbers.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert names(tmp_path) == ["numbers.json"]


def test_atomic_folder_replaces_a_folder_as_a_whole(tmp_path):
    target = tmp_path / "pipeline"
    write_folder(target, old="1")
    with atomic_path(target) as new:
        write_folder(new, new="2")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["pipeline"]


def test_crash_leaves_the_old_folder_whole(tmp_path):
    target = tmp_path / "pipeline"
    write_folder(target, old="1")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as new:
        write_folder(new, new="2")
        raise ZeroDivisionError
    assert names(target) == ["old"]
    assert names(tmp_path) == ["pipeline"]


def test_failing_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "pipeline"
    write_folder(target, old="1")
    replace = os.replace

    def replace_but_not_the_new_folder(source, destination):
        if Path(source, "new").exists():
            raise OSError("no")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", replace_but_not_the_new_folder)
    with pytest.raises(OSError, match="no"), atomic_path(target) as new:
        write_folder(new, new="2")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["pipeline"]


def test_folder_set_aside_by_a_killed_process_comes_back(tmp_path):
    write_folder(tmp_path / ".old.pipeline", old="1")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "pipeline"):
        raise ZeroDivisionError
    assert names(tmp_path / "pipeline") == ["old"]


def test_writing_through_a_link_keeps_the_link(tmp_path):
    write_folder(tmp_path / "disk", old="1")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_path(tmp_path / "link") as new:
        write_folder(new, new="2")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["new"]


def test_writing_nothing_or_a_file_over_a_folder_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="Nothing was written"), atomic_path(tmp_path / "file"):
        pass
    write_folder(tmp_path / "folder", old="1")
    with pytest.raises(OSError), atomic_path(tmp_path / "folder") as new:
        new.write_text("a file")
    assert names(tmp_path) == ["folder"]


def test_write_json_refuses_what_json_cannot_express(tmp_path):
    path = tmp_path / "metrics.json"
    write_json({"concept": "größe", "p": 0.5}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"concept": "größe", "p": 0.5}
    for bad, error in ((float("nan"), ValueError), (torch.ones(1), TypeError)):
        with pytest.raises(error):
            write_json({"p": bad}, path)
    assert json.loads(path.read_text(encoding="utf-8"))["p"] == 0.5


def test_fingerprint_depends_on_values_but_not_on_order():
    one = fingerprint({"seed": 0, "data": {"a": 1, "b": [1, 2]}})
    assert len(one) == 16 and int(one, 16) >= 0
    assert one == fingerprint({"data": {"b": [1, 2], "a": 1}, "seed": 0})
    assert one != fingerprint({"data": {"b": [2, 1], "a": 1}, "seed": 0})


def test_hash_tensors_ignores_order_and_layout():
    weight = torch.randn(3, 4).to(torch.bfloat16)
    tensors = {"w": weight, "scalar": torch.tensor(1.0), "empty": torch.zeros(0, 2)}
    expected = hash_tensors(tensors)
    assert len(expected) == 16
    assert expected == hash_tensors(dict(reversed(tensors.items())))
    assert expected == hash_tensors(tensors | {"w": weight.T.contiguous().T})


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([[1.0, 2.0]])},
        {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"w": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"w": torch.tensor([1.0, 2.0000002])},
        {"v": torch.tensor([1.0, 2.0])},
    ],
    ids=["shape", "dtype", "dtype with the same bytes", "value", "name"],
)
def test_hash_tensors_sees(other):
    assert hash_tensors(other) != hash_tensors({"w": torch.tensor([1.0, 2.0])})


@pytest.mark.slow
def test_second_process_is_refused_until_the_first_dies(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderBusy, match=rf"pid {first.pid} on .*, since 2.*--output_dir"):
            with run_lock(tmp_path / "run"):
                pytest.fail("two runs in one folder")
    finally:
        first.kill()  # no clean-up of its own: the kernel drops the lock
        first.communicate()
    with run_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()


def test_lock_is_dropped_on_exit_and_on_errors(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with run_lock(tmp_path), pytest.raises(RunFolderBusy), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_lock_in_an_unwritable_place_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Cannot write to the output folder .*--output_dir"):
        run_lock(tmp_path / "file" / "run").__enter__()


def test_stage_is_reused_with_the_same_key(tmp_path):
    marker = Marker(tmp_path, "fisher", {"seed": 0, "data": {"num_samples": 96}, "betas": (0.9, 0.99)})
    assert not marker.done()
    with pytest.raises(ArtifactError, match="'fisher' .* not finished"):
        _ = marker.seconds
    marker.finish(1.5)

    again = Marker(tmp_path, "fisher", {"betas": [0.9, 0.99], "data": {"num_samples": 96}, "seed": 0})
    assert again.done()
    assert again.fingerprint == marker.fingerprint
    assert again.seconds == 1.5
    assert not Marker(tmp_path, "train", {"seed": 0}).done()

    again.clear()
    assert not marker.done()
    again.clear()


def test_stage_of_another_configuration_is_refused_with_the_differing_fields(tmp_path):
    Marker(tmp_path, "train", {"lr": 1e-4, "seed": 0, "ewc": {"lambda": 50, "kind": "diag"}, "gone": 1}).finish(2.0)
    marker = Marker(tmp_path, "train", {"lr": 1e-4, "seed": 1, "ewc": {"lambda": 5.0, "kind": "diag"}, "added": "x"})
    with pytest.raises(StageMismatch) as caught:
        _ = marker.done()
    message = str(caught.value)
    for line in ("seed: 0 -> 1", "ewc.lambda: 50 -> 5.0", "gone: 1 -> (absent)", 'added: (absent) -> "x"'):
        assert f"  {line}\n" in message
    assert "lr" not in message and "kind" not in message
    assert "--output_dir" in message and "--overwrite" in message

    marker.clear()
    assert not marker.done()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": [], "fingerprint": "a", "seconds": 1}', "\0\0"])
def test_a_marker_of_another_shape_is_named(tmp_path, text):
    marker = Marker(tmp_path, "train", {})
    marker.finish(1.0)
    marker.path.write_text(text)
    with pytest.raises(ArtifactError, match=r"train\.json is damaged: delete it to compute the stage 'train' again"):
        _ = marker.done()


def test_a_stage_vouches_for_what_it_left(tmp_path):
    marker, left = Marker(tmp_path, "train", {}), tmp_path / "pipeline" / "weights"
    left.parent.mkdir()
    left.write_bytes(bytes(100_000))
    marker.finish(1.0, [left], {"for": "people"})
    marker.check()
    assert marker.info == {"for": "people"}
    left.write_bytes(bytes(50_000) + b"\1" + bytes(49_999))
    with pytest.raises(DamagedFile, match="pipeline/weights is not what was written there: delete .*'train' again"):
        marker.check()
    left.unlink()
    with pytest.raises(DamagedFile, match="pipeline/weights is missing: delete .*train.json"):
        marker.check()


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"", lambda data: b"\xff" * 9 + data])
def test_damaged_tensors_are_named(tmp_path, damage):
    path = tmp_path / "samples.safetensors"
    SampleSet(torch.zeros(2, 4, 8, 8), [Condition("a"), Condition("b")]).save(path)
    assert len(SampleSet.load(path)) == 2
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile, match="samples.safetensors is damaged .*: copy it again, or delete it"):
        SampleSet.load(path)


def test_files_of_something_else_are_named(tmp_path):
    path = tmp_path / "file.safetensors"
    save_tensors({"latents": torch.zeros(2, 4)}, path, prompts=["one for two"])
    for load in (SampleSet.load, Findings.load, FoundEmbedding.load, lambda path: load_tensors(path, "tensor")):
        with pytest.raises(DamagedFile, match="file.safetensors is damaged"):
            load(path)
    for text in ("[1]", '{"vectors": 1}', "{"):
        path.write_text(text)
        with pytest.raises(DamagedFile, match="file.safetensors is damaged"):
            FoundText.load(path)


def test_check_disk_says_what_is_missing(tmp_path):
    future = tmp_path / "not" / "yet"
    check_disk(future, 1)
    with pytest.raises(DiskFull, match=r"yet needs 1000000.00 GB, .* GB free\. .*--output_dir") as caught:
        check_disk(future, 10**15)
    assert isinstance(caught.value, OSError) and isinstance(caught.value, ArtifactError)
    assert not future.exists()


def test_check_disk_counts_free_bytes(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_disk(tmp_path, 100)
    with pytest.raises(DiskFull):
        check_disk(tmp_path, 101)


def test_equal_tensors_and_notes_are_equal_bytes(tmp_path):
    """The library alone writes notes in a random order, another one at every call."""
    notes = {name: {"number": number} for number, name in enumerate("findings requests key values words".split())}
    for name in ("first", "second"):
        save_tensors({"pictures": torch.arange(3)}, tmp_path / name, **notes)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    tensors, found = load_tensors(tmp_path / "first", "pictures", "key")
    assert tensors["pictures"].tolist() == [0, 1, 2] and found == notes
