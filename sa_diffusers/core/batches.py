"""Batches: tensors by name, possibly nested, that share their first dimension; "sample" holds the data.

A nested part is what a model takes as one dict, such as the added conditions of SDXL.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


Batch = Mapping[str, "Tensor | Batch"]
Rows = slice | Tensor | list[int]


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> dict:
    """The batch with every tensor changed."""
    return {
        name: map_tensors(part, change) if isinstance(part, Mapping) else change(part) for name, part in batch.items()
    }


def to(batch: Batch, device: torch.device | str) -> dict:
    """The batch on a device."""
    # To the CPU a copy that does not block is read before it is there.
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=torch.device(device).type != "cpu"))


def take(batch: Batch, rows: Rows) -> dict:
    """Some of its rows: a slice, indices, or a mask [B] of booleans."""
    return map_tensors(batch, lambda tensor: tensor[rows])


def repeat(batch: Batch, count: int) -> dict:
    """A batch of one row as `count` equal ones, without copying them."""
    return map_tensors(batch, lambda tensor: tensor.expand(count, *tensor.shape[1:]))


def cat(batches: Sequence[Batch]) -> dict:
    """Several batches with the same names as one. Raises KeyError where a name is missing."""
    first = batches[0]
    return {
        name: (cat if isinstance(part, Mapping) else torch.cat)([batch[name] for batch in batches])
        for name, part in first.items()
    }


def conditions_of(batch: Batch) -> dict:
    """What a batch holds beside the data."""
    return {name: part for name, part in batch.items() if name != "sample"}
