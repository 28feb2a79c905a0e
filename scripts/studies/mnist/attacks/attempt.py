"""What all attacks share: the decoder under attack, the reader of its images, and the record of an attempt."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


# (latents [B, L], condition weights [B, K]) -> images [B, C, H, W] in [0, 1]; `ConditionalVAE.decode` is one.
Decoder = Callable[[Tensor, Tensor], Tensor]

# images [B, C, H, W] in [0, 1] -> logits [B, classes]. Log probabilities serve too: they are their own log-softmax.
# Differentiable where an attack climbs it, and in eval mode, so that no image depends on the others of its batch.
Reader = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attempt:
    """What an attack put into the decoder, and what came out.

    Attributes:
        images: [B, C, H, W] in [0, 1].
        latents: z [B, L].
        conditions: weights [B, K] as the decoder got them, after any softmax.
    """

    images: Tensor
    latents: Tensor
    conditions: Tensor


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Class indices [B] as float weights [B, num_classes].

    Raises:
        ValueError: labels of another shape, or one that is no class.
    """
    if labels.dim() != 1 or len(labels) == 0 or labels.is_floating_point():
        raise ValueError(f"expected class indices [B], got {labels.dtype} {list(labels.shape)}")
    for label in (int(labels.min()), int(labels.max())):
        check_class(label, num_classes)
    return torch.nn.functional.one_hot(labels.long(), num_classes).float()


def check_class(label: int, num_classes: int) -> None:
    """Raise ValueError unless `label` is one of `num_classes` classes."""
    if not 0 <= label < num_classes:
        raise ValueError(f"expected a class from 0 to {num_classes - 1}, got {label}")


def check_pairs(latents: Tensor, others: Tensor, name: str) -> None:
    """Raise ValueError unless both are [B, ...] float matrices with one row for each attempt."""
    if latents.dim() != 2 or others.dim() != 2 or len(latents) != len(others) or len(latents) == 0:
        shapes = f"{list(latents.shape)} and {list(others.shape)}"
        raise ValueError(f"expected latents [B, L] and {name} [B, K], at least one of each, got {shapes}")
    if not (latents.is_floating_point() and others.is_floating_point()):
        raise ValueError(f"expected floats, got latents of {latents.dtype} and {name} of {others.dtype}")
