"""Tensors with their numbers, kept in a file and found again as long as nothing that decided them has changed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import load_tensors, save_tensors


Kept = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and JSON-like notes


def kept(path: Path, name: str, identity: Mapping[str, Any], compute: Callable[[], Kept]) -> Kept:
    """What `compute` returns, from `path` if that was made under the same identity, else computed and written there.

    Args:
        name: of the notes in the file's header; the key of the identity stands among them.
        identity: JSON-like, everything that decides the result.
    """
    key = fingerprint(identity)
    if path.exists():
        tensors, notes = load_tensors(path)
        if notes[name]["key"] == key:
            return tensors, notes[name]
    tensors, notes = compute()
    tensors, notes = {part: tensor.contiguous() for part, tensor in tensors.items()}, {"key": key} | notes
    save_tensors(tensors, path, **{name: notes})
    return tensors, notes
