"""Tensors with their numbers, kept in a file and found again as long as nothing that decided them has changed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path


Kept = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and JSON-like notes


def kept(path: Path, name: str, identity: Mapping[str, Any], compute: Callable[[], Kept]) -> Kept:
    """What `compute` returns, from `path` if that was made under the same identity, else computed and written there.

    Args:
        name: of the notes in the file's header; the key of the identity stands among them.
        identity: JSON-like, everything that decides the result.
    """
    key = fingerprint(identity)
    if path.exists():
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()[name])
            if notes["key"] == key:
                return {part: file.get_tensor(part) for part in file.keys()}, notes  # noqa: SIM118, no dict
    tensors, notes = compute()
    tensors, notes = {part: tensor.contiguous() for part, tensor in tensors.items()}, {"key": key} | notes
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={name: json.dumps(notes)})
    return tensors, notes
