"""Files that stages leave behind: written whole or not at all, recognised by a key, never mixed.

A stage is reused when the folder holds its marker with the same key, computed when there is no marker, and refused
when the marker was written with another key: results of two configurations must not share a folder unnoticed.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError


class ArtifactError(RuntimeError):
    """An output folder cannot be used as asked. Base class of every error of this module."""


class RunFolderBusy(ArtifactError):
    """Another process works in the output folder."""


class StageMismatch(ArtifactError):
    """The folder holds the result of this stage for another configuration."""


class DiskFull(ArtifactError, OSError):
    """The file system has less room than the work needs."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, more than one file may hold
# How libraries say it that raise no OSError: safetensors by the number, torch by the place in its own code.
NO_ROOM_TEXTS = (*(f"(os error {number})" for number in NO_ROOM), "inline_container", "PytorchStreamWriter")


@contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Raise what a user can read where the block cannot write `path`: every library fails in its own way.

    Raises:
        DiskFull: there is no room.
        ArtifactError: safetensors cannot write for another reason.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        if getattr(error, "errno", None) in NO_ROOM or any(text in str(error) for text in NO_ROOM_TEXTS):
            raise DiskFull(
                f"No room to write {path} ({error}). What was finished before is whole: make room there and run the "
                "same command again, or pass an --output_dir on another disk."
            ) from error
        if isinstance(error, SafetensorError):
            raise ArtifactError(f"Cannot write {path}: {error}") from error
        raise


def _sync(path: Path) -> None:
    """Flush one file, or one folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _swap_folders(new: Path, path: Path, old: Path) -> None:
    """Put the folder `new` in the place of the folder `path`, which is kept as `old` until that is done.

    A folder cannot be renamed over one that is not empty, so there is an instant without `path`; a process killed
    in it leaves `old`, which the next `atomic_path` puts back.
    """
    if old.exists():  # beside a whole `path`: a process was killed while it removed the folder it had replaced
        shutil.rmtree(old)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` on success and is removed on an error.

    Args:
        path: the file or folder to write. Missing parents are made. What exists there stays whole until the new one
            is complete on the disk. The yielded path has the same suffix; write a file or make a folder there.

    Raises:
        ArtifactError: the block wrote nothing, or could not write.
        DiskFull: there was no room.
        OSError: the new one cannot replace the old one, for example a file a folder.
    """
    path = Path(path).resolve()  # through links: a rename is atomic only inside one file system
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}"), path.with_name(f".old.{path.name}")
    if old.exists() and not path.exists():
        os.replace(old, path)
    try:
        with explain_write_errors(path):
            yield new
        if not new.exists():
            raise ArtifactError(f"Nothing was written for {path}: write to the path that atomic_path yields.")
        for written in new.rglob("*") if new.is_dir() else [new]:
            if written.is_file():
                written.chmod(0o666 & ~_umask())  # safetensors writes files that nobody else may read
            _sync(written)
        if path.is_dir() and new.is_dir():
            _swap_folders(new, path, old)
        else:
            os.replace(new, path)
        _sync(path.parent)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        new.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what `atomic_path` was writing below `folder` when a process was killed; hold the folder's lock."""
    for path in list(Path(folder).rglob(".*")):
        if not re.fullmatch(r"\.[0-9a-f]{8}\..+", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have lain in a folder that is gone


def write_json(obj: Any, path: str | Path) -> None:
    """Write `obj` as indented JSON, atomically. Raises TypeError or ValueError (NaN) if JSON has no form for it."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as new:
        new.write_text(text + "\n", encoding="utf-8")


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hash JSON-like fields, whatever their order, to 16 hex digits (SHA-256). Raises TypeError on other types."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hash names, dtypes, shapes and values of tensors, whatever their order and device, to 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # as bytes: numpy has no bfloat16
    return digest.hexdigest()


class RunLock:
    """Context manager that keeps a second run out of `output_dir`, which is made if missing.

    The kernel drops the lock when the process ends, however it ends, so a crash never leaves a folder locked; the file
    `.lock` stays and only says who holds it. In a job of several processes the main one takes it.

    Raises on entry:
        RunFolderBusy: another run holds the folder.
        ArtifactError: the folder cannot be made or written to.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / ".lock"

    def __enter__(self) -> "RunLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise ArtifactError(
                f"Cannot write to the output folder {self.path.parent}: {error.strerror}. "
                "Pass another --output_dir or change the folder's permissions."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                raise RunFolderBusy(
                    f"Another run works in {self.path.parent} ({self._holder(file)}). "
                    "Wait for it, stop it, or pass another --output_dir."
                ) from error
        file.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        note = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        print(note, file=file, flush=True)
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()  # drops the lock; the file stays, since a removed one could be locked beside its successor

    @staticmethod
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


OVERWRITE = "Pass another --output_dir, or --overwrite to compute it again."


class Stage:
    """One stage of a run and its marker `<output_dir>/.stages/<name>.json`, which is written last.

    Args:
        output_dir: the run's folder.
        name: the stage's name, also the marker's file name.
        key: JSON-like fields that decide the result: the stage's settings and the fingerprints of its inputs.
    """

    def __init__(self, output_dir: str | Path, name: str, key: Mapping[str, Any], advice: str = OVERWRITE) -> None:
        self.output_dir, self.name, self.key, self.advice = Path(output_dir), name, dict(key), advice
        self.fingerprint = fingerprint(key)
        self.marker = self.output_dir / ".stages" / f"{name}.json"

    @property
    def done(self) -> bool:
        """Whether a finished result with this key exists. Raises StageMismatch if one with another key does."""
        if not self.marker.exists():
            return False
        marker = self._read()
        if marker["fingerprint"] == self.fingerprint:
            return True
        old, new = _flatten(marker["key"]), _flatten(self.key)
        names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
        lines = [f"  {name}: {old.get(name, '(absent)')} -> {new.get(name, '(absent)')}" for name in names]
        raise StageMismatch(
            f"{self.output_dir} holds the stage '{self.name}' of another configuration:\n"
            + "\n".join(lines)
            + f"\n{self.advice}"
        )

    @property
    def info(self) -> dict[str, Any]:
        """What `finish` was told. Raises ArtifactError when the stage is not finished."""
        return self._read()["info"]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run that computed the stage. Raises ArtifactError when it is not finished."""
        return self._read()["seconds"]

    def finish(self, seconds: float, **info: Any) -> None:
        """Mark the stage as complete: call it after everything the stage leaves is on the disk."""
        write_json({"key": self.key, "fingerprint": self.fingerprint, "seconds": seconds, "info": info}, self.marker)

    def clear(self) -> None:
        """Forget that the stage was done, so that it is computed again; its results are left to be replaced."""
        self.marker.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.marker.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtifactError(f"The stage '{self.name}' of {self.output_dir} is not finished.") from error
        except ValueError as error:
            raise ArtifactError(f"{self.marker} is damaged: delete it to compute the stage again.") from error


def check_disk(path: str | Path, needed_bytes: int) -> None:
    """Raise DiskFull unless the file system that will hold `path` (which need not exist yet) has room for it."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskFull(
            f"{path} needs {needed_bytes / 1e9:.2f} GB, but its file system has {free / 1e9:.2f} GB free. "
            "Make room there or pass an --output_dir on another disk."
        )
