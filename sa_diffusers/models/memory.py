"""Memory: what is free, and what the tensors of a computation take."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def free_memory(device: torch.device) -> int:
    """Bytes that tensors could still take: on a GPU what nobody holds, and what torch holds without using it."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block and still alive, on any device.

    Storages that exist before the block are not counted, nor is scratch memory inside an operator. Meta tensors count
    with the size they would have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0  # bytes at the moment, and at most so far
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            self._note(tensor, existed=True)
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._note(tensor, existed=False)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, tensor: Tensor, existed: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = 0 if existed else storage.nbytes()
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def tensors_in(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
