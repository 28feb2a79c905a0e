"""Files written whole or not at all, and errors that say why one could not be; text as users have it."""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sa_diffusers.core.safetensors_header import sort_metadata


class ArtifactError(RuntimeError):
    """An output folder cannot be used as asked. Base class of what can go wrong with its files."""


class DamagedFile(ArtifactError, ValueError):
    """A file is cut off, or holds something else than it should."""


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


@contextmanager
def explain_read_errors(path: str | Path) -> Iterator[None]:
    """Raise DamagedFile, which names `path` and what to do, where the block finds something else in it."""
    try:
        yield
    except DamagedFile:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        again = "copy it again, or delete it to have it made again"
        raise DamagedFile(f"{path} is damaged ({type(error).__name__}: {error}): {again}") from error


def read_json(path: str | Path, *fields: str) -> dict[str, Any]:
    """The object in a JSON file. Raises DamagedFile where it is none, or lacks one of the fields."""
    with explain_read_errors(path):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"expected an object, got a {type(found).__name__}")
        if missing := [name for name in fields if name not in found]:
            raise ValueError(f"no {', '.join(missing)}")
        return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damages(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """What is wrong with files, whose names in the folder and `file_hash` these are: one text a file."""
    there = {name: (folder / name).is_file() for name in hashes}
    return [
        f"{folder / name} " + ("is not what was written there" if there[name] else "is missing")
        for name, expected in hashes.items()
        if not there[name] or file_hash(folder / name) != expected
    ]


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


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of one compressed by gzip (.gz): lines end in "\\n", a byte-order mark is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: another encoding, or a damaged archive.
    """
    content = Path(path).read_bytes()
    if Path(path).suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); compress it again") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError(f"expected text in UTF-8, got {path}, which is in UTF-16 or no text at all; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8, got the byte {content[error.start]:#x}, as in files in latin-1 "
            "(Windows-1252); save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_text(text: str, path: str | Path) -> None:
    """Write a text file as UTF-8, atomically."""
    with atomic_path(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(obj: Any, path: str | Path) -> None:
    """Write `obj` as indented JSON, atomically. Raises TypeError or ValueError (NaN) if JSON has no form for it."""
    write_text(json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, **notes: Any) -> None:
    """Write one safetensors file, atomically; what JSON has a form for stands in its header."""
    with atomic_path(path) as new:
        header = {name: json.dumps(note) for name, note in notes.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata=header or None)
        if header:
            sort_metadata(new)


def load_tensors(path: str | Path, *names: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of `save_tensors`, on the CPU and its notes. Raises DamagedFile, or where a name lacks."""
    with explain_read_errors(path), safe_open(path, "pt") as file:
        notes = {name: json.loads(note) for name, note in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
        if missing := [name for name in names if name not in tensors | notes]:
            raise ValueError(f"no {', '.join(missing)}")
        return tensors, notes


def check_disk(path: str | Path, needed_bytes: int) -> int:
    """Free bytes of the file system that will hold `path` (which need not exist yet). Raises DiskFull: too few."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskFull(
            f"{path} needs {needed_bytes / 1e9:.2f} GB, but its file system has {free / 1e9:.2f} GB free. "
            "Make room there or pass an --output_dir on another disk."
        )
    return free
