"""Files that stages leave behind: written whole or not at all, recognised by a key, never mixed.

A stage is reused when the folder holds its marker with the same key, computed when there is no marker, and refused
when the marker was written with another key: results of two configurations must not share a folder unnoticed.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from sa_diffusers.io.atomic_files import (
    ArtifactError,
    DamagedFile,
    damages,
    file_hash,
    read_json,
    write_json,
)


class RunFolderBusy(ArtifactError):
    """Another process works in the output folder."""


class StageMismatch(ArtifactError):
    """The folder holds the result of this stage for another configuration."""


# Files by which the folder of a run, a pipeline, an attack or an evaluation is known.
MARKS = ("pipeline/model_index.json", "model_index.json", "config.yaml", "attack.json", "evaluation.json")


def check_foreign(output_dir: Path, *own: str) -> None:
    """Raise ValueError for the folder of another command, whose report.html would be replaced.

    Args:
        own: what the asking command leaves there, as patterns.
    """
    if output_dir.is_file():
        raise ValueError(f"expected a folder as --output_dir, got the file {output_dir}; pass another")
    theirs = [name for name in MARKS if name not in own and (output_dir / name).exists()]
    if (output_dir / "report.html").exists() and not any(path for name in own for path in output_dir.glob(name)):
        theirs.append("report.html")
    if theirs:
        raise ValueError(
            f"{output_dir} holds {' and '.join(theirs)}, so it is the folder of a run or of something else, whose "
            "report.html must not be replaced; pass another --output_dir"
        )


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hash JSON-like fields, whatever their order, to 16 hex digits (SHA-256). Raises TypeError on other types."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_tensors(state_dict: Mapping[str, torch.Tensor], half_as_float32: bool = False) -> str:
    """Hash names, dtypes, shapes and values of tensors, whatever their order and device, to 16 hex digits.

    Args:
        half_as_float32: tensors of half precision hash as their copies in float32.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        tensor = tensor.float() if half_as_float32 and tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # as bytes: numpy has no bfloat16
    return digest.hexdigest()


@contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Keep a second run out of `output_dir`, which is made if missing, within the block.

    The kernel drops the lock when the process ends, however it ends, so a crash never leaves a folder locked; the file
    `.lock` stays and only says who holds it. In a job of several processes the main one takes it.

    Raises:
        RunFolderBusy: another run holds the folder.
        ArtifactError: the folder cannot be made or written to.
    """
    path = Path(output_dir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        denied = " or change the folder's permissions" if isinstance(error, PermissionError) else ""
        raise ArtifactError(
            f"Cannot write to the output folder {path.parent}: {error.strerror}. Pass another --output_dir{denied}."
        ) from error
    with file:  # the end drops the lock; the file stays, since a removed one could be locked beside its successor
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderBusy(
                f"Another run works in {path.parent} ({_holder(file)}). "
                "Wait for it, stop it, or pass another --output_dir."
            ) from error
        file.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        note = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        with suppress(OSError):  # on a full disk a finished run can be looked at all the same
            os.write(file.fileno(), f"{note}\n".encode())
        yield


def _holder(file: TextIO) -> str:
    """Describe who holds the lock; the note may be missing for the instant between locking and writing it."""
    file.seek(0)
    try:
        return "pid {pid} on {host}, since {started}".format(**json.loads(file.read()))
    except (ValueError, KeyError):
        return "just started"


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}: values as JSON, so that 1, 1.0 and "1" differ as they do in the fingerprint."""
    flat = {}
    for name, value in fields.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": json.dumps(value)}
    return flat


MARKER = {"key": dict, "fingerprint": str, "seconds": int | float, "info": dict, "files": dict}
OVERWRITE = "Pass another --output_dir, or --overwrite to compute it again."


class Marker:
    """A stage's marker, `<output_dir>/.stages/<name>.json`: written last, it says that the stage is done, by its key.

    Args:
        output_dir: the run's folder.
        name: the stage's name, also the marker's file name.
        key: JSON-like fields that decide the result: the stage's settings and the fingerprints of its inputs.
        advice, legends: for an error where it holds another key: what to do, and what parts of keys are made of.
    """

    def __init__(
        self,
        output_dir: str | Path,
        name: str,
        key: Mapping[str, Any],
        advice: str = OVERWRITE,
        legends: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.output_dir, self.name, self.key, self.advice = Path(output_dir), name, dict(key), advice
        self.legends = legends
        self.fingerprint = fingerprint(key)
        self.path = self.output_dir / ".stages" / f"{name}.json"

    def done(self, overwrite: bool = False) -> bool:
        """Whether a finished result with this key exists.

        Raises StageMismatch if one with another key does, which counts as none where `overwrite`.
        """
        if not self.path.exists():
            return False
        marker = self._read()
        if overwrite or marker["fingerprint"] == self.fingerprint:
            return marker["fingerprint"] == self.fingerprint
        old, new = _flatten(marker["key"]), _flatten(self.key)
        names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
        lines = [f"  {name}: {old.get(name, '(absent)')} -> {new.get(name, '(absent)')}" for name in names]
        lines += [f"  ({part}: {said})" for part, said in self.legends if any(name.startswith(part) for name in names)]
        raise StageMismatch(
            f"{self.output_dir} holds the stage '{self.name}' of another configuration:\n"
            + "\n".join(lines)
            + f"\n{self.advice}"
        )

    def refuse_others(self, *ours: str) -> None:
        """Raise StageMismatch where there is no marker, and the folder holds more than what has been here before one.

        Args:
            ours: further names that such a folder may have.
        """
        # A run that was killed here, or found the disk full, has left a folder of stages with none in it.
        stages = self.path.parent
        known = {".lock", *ours} | (set() if list(stages.glob("[!.]*.json")) else {stages.name})
        if not self.path.exists() and any(path.name not in known for path in self.output_dir.glob("*")):
            raise StageMismatch(f"{self.output_dir} holds files of something else; pass another --output_dir")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run that computed the stage. Raises ArtifactError when it is not finished."""
        return self._read()["seconds"]

    @property
    def info(self) -> dict[str, Any]:
        """What `finish` was told of the result, for people."""
        return self._read()["info"]

    def finish(self, seconds: float, files: Iterable[Path] = (), info: Mapping[str, Any] | None = None) -> None:
        """Mark the stage as complete: call it after everything that it leaves, of which `files`, is on the disk."""
        hashes = {str(path.relative_to(self.output_dir)): file_hash(path) for path in sorted(files)}
        marker = {"key": self.key, "fingerprint": self.fingerprint, "seconds": seconds, "info": dict(info or {})}
        write_json(marker | {"files": hashes}, self.path)

    def check(self) -> None:
        """Raise DamagedFile where a file that the stage left is gone, or not as it was."""
        if found := damages(self.output_dir, self._read()["files"]):
            raise DamagedFile(f"{found[0]}: delete {self.path} to compute the stage '{self.name}' again")

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Say by which names the files that the stage left go now."""
        marker = self._read()
        write_json(marker | {"files": {renamed(name): value for name, value in marker["files"].items()}}, self.path)

    def clear(self) -> None:
        """Forget that the stage was done, so that it is computed again; its results are left to be replaced."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            return read_marker(self.path)
        except FileNotFoundError as error:
            raise ArtifactError(f"The stage '{self.name}' of {self.output_dir} is not finished.") from error


def read_marker(path: Path) -> dict[str, Any]:
    """The key, fingerprint, seconds, info and hashes of files in a stage's marker. Raises DamagedFile."""
    try:
        marker = {"files": {}} | read_json(path)  # older ones know of no files
    except DamagedFile:
        marker = {}
    if not all(isinstance(marker.get(name), kind) for name, kind in MARKER.items()):
        raise DamagedFile(f"{path} is damaged: delete it to compute the stage '{path.stem}' again")
    return marker
