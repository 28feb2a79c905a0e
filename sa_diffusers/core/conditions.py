"""What a picture is asked for by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


MASKS = ("half", "quarter", "ring", "top", "bottom", "left", "right", "random")
# What a picture to complete is shown as, by index; the last two leave something of every pixel.
DEGRADATIONS = ("mask", "grey", "coarse")
COARSE = 4  # pixels of a side that become one


@dataclass(frozen=True)
class Condition:
    """What a picture is asked for by; without text and label it is the empty prompt, or the null class.

    Attributes:
        text: a prompt, or the name of a class.
        label: index of a class, which comes before its name; None: a model of classes goes by the text.
        mask: name of what a model that completes pictures has to fill, as of `hidden_patches`, or of DEGRADATIONS.
    """

    text: str = ""
    label: int | None = None
    mask: str | None = None

    def __str__(self) -> str:
        return repr(self.text) if self.label is None else f"class {self.label}"


def hidden_patches(mask: str, rows: int) -> Tensor:
    """The patches that a named mask hides, booleans [rows * rows], row by row; a hole snaps outward to patches.

    "half" and "quarter" are centred squares of that share of the side, "ring" is all around the first; "top",
    "bottom", "left" and "right" are halves. "left 25" is a quarter of the side, and "ring 75" leaves a square of three
    quarters of it. "random 7" is half of the patches by the seed 7 ("random": by 0).

    Raises:
        ValueError: another name, or a mask that hides nothing or everything of so few patches.
    """
    name, _, number = mask.partition(" ")
    if name not in MASKS or (number and (name in ("half", "quarter") or not number.isdecimal())):
        raise ValueError(f"expected a mask of {', '.join(MASKS)}, or one such as 'left 25', got {mask!r}")
    if name == "random":
        order = torch.randperm(rows * rows, generator=torch.Generator().manual_seed(int(number or 0)))
        hidden = order < rows * rows // 2
    else:
        percent = min(100, int(number or {"quarter": 25}.get(name, 50)))
        near, far = rows * (100 - percent) // 200, -(-rows * (100 + percent) // 200)
        depth = -(-rows * percent // 100)
        whole, square = slice(None), (slice(near, far),) * 2
        first, last = slice(depth), slice(rows - depth, None)
        sides = {"top": (first, whole), "bottom": (last, whole), "left": (whole, first), "right": (whole, last)}
        box = torch.zeros(rows, rows, dtype=torch.bool)
        box[sides.get(name, square)] = True
        hidden = (~box if name == "ring" else box).flatten()
    if hidden.all() or not hidden.any():
        raise ValueError(f"the mask {mask!r} hides {int(hidden.sum())} of {rows} x {rows} patches; pass another one")
    return hidden


def degraded(images: Tensor, hidden: Tensor, kinds: Tensor) -> Tensor:
    """Images [B, C, H, W] with 0 where `hidden` [B, 1, H, W] says, or the mean of channels, or of squares of 4 pixels.

    Args:
        kinds: of each image, [B], indices into DEGRADATIONS.
    """
    grey = images.mean(1, keepdim=True).expand_as(images)
    coarse = F.interpolate(F.avg_pool2d(images, COARSE), images.shape[2:], mode="nearest")
    return torch.stack([images * ~hidden, grey, coarse])[kinds, torch.arange(len(images), device=images.device)]


def texts(conditions: Sequence[Condition]) -> list[str]:
    """What they say in words. Raises ValueError for a label, which says nothing in words, and for bare strings."""
    for condition in conditions:
        if not isinstance(condition, Condition) or condition.label is not None:
            raise ValueError(f"expected conditions of text alone, got {condition!r}; pass Condition('a red seven')")
    return [condition.text for condition in conditions]


def classes(conditions: Sequence[Condition]) -> list[int | str]:
    """The class of each, by index or by name, "" for the null class. Raises ValueError for bare strings."""
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise ValueError(f"expected conditions, got {condition!r}; pass Condition('seven') or Condition(label=7)")
    return [condition.text if condition.label is None else condition.label for condition in conditions]


def masks(conditions: Sequence[Condition]) -> list[str]:
    """The mask of each. Raises ValueError where there is none, or words that a model without text cannot read."""
    for condition in conditions:
        if not isinstance(condition, Condition) or condition.mask is None or condition.text:
            raise ValueError(
                f"expected conditions with a mask and no text, got {condition!r}; pass Condition(mask='half')"
            )
    return [condition.mask for condition in conditions]
