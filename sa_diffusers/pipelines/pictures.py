"""Pictures and masks that pipelines are given, as tensors."""

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F


def read_pictures(processor: VaeImageProcessor, given: Any, modes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """[B, C, H, W] as the processor makes them. Raises ValueError: no pictures; another size, mode, or range."""
    pictures = given if isinstance(given, list) else [given]
    if not pictures:
        raise ValueError("expected a picture or more, got none")
    kinds = {next((kind for kind in (Image, np.ndarray, Tensor) if isinstance(one, kind)), None) for one in pictures}
    sizes = {tuple(one.size if isinstance(one, Image) else one.shape[-3:]) for one in pictures if None not in kinds}
    if None in kinds or len(kinds) > 1 or len(sizes) > 1:
        found = ", ".join(sorted({type(one).__name__ for one in pictures} | set(map(str, sizes))))
        raise ValueError(
            f"expected a picture, an array or a tensor, or a list of them, alike and of one size, got {found}"
        )
    if wrong := [p.mode for p in pictures if isinstance(p, Image) and p.mode not in modes]:
        raise ValueError(f"expected the mode {' or '.join(modes)}, got {wrong[0]}; convert the picture first")
    if not isinstance(pictures[0], Image):
        values = torch.cat([torch.as_tensor(picture).flatten().float() for picture in pictures])
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("expected values in [0, 1], got others")
    found = processor.preprocess(given)
    if tuple(found.shape[1:]) != shape:
        raise ValueError(f"expected {shape[1]} x {shape[2]} pixels in {shape[0]} channels, got {list(found.shape)}")
    return found


def processors(channels: int) -> tuple[VaeImageProcessor, VaeImageProcessor]:
    """Of pictures with so many channels, and of masks."""
    grey, alike = channels == 1, {"do_resize": False}
    pictures = VaeImageProcessor(do_convert_grayscale=grey, do_convert_rgb=False, **alike)
    return pictures, VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, **alike)


def read_masks(processor: VaeImageProcessor, given: Any, images: Tensor) -> Tensor:
    """Masks [B, 1, H, W] for images [B, C, H, W], from one for all or one a picture. Raises as `read_pictures`."""
    masks = read_pictures(processor, given, ("1", "L", "RGB"), (1, *images.shape[2:]))
    if len(masks) not in (1, len(images)):
        raise ValueError(f"expected 1 mask or {len(images)}, got {len(masks)}")
    return masks.expand(len(images), -1, -1, -1)


def generators_of(given: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One a picture; None: the seed 0. Raises ValueError: another number."""
    one_for_all = given or torch.Generator().manual_seed(0)
    generators = given if isinstance(given, list) else [one_for_all] * count
    if len(generators) != count:
        raise ValueError(f"expected 1 generator or {count}, got {len(generators)}")
    return generators


def patches_of(masks: Tensor, size: int) -> Tensor:
    """The patches [B, L] with anything above 0 in them, of masks [B, 1, H, W]. Raises ValueError: none, or all."""
    hidden = F.max_pool2d(masks.float(), size).flatten(1) > 0
    counts = hidden.sum(1)
    if (wrong := (counts == 0) | (counts == hidden.shape[1])).any():
        raise ValueError(
            f"expected masks that leave something to fill and something to go by, got one with "
            f"{int(counts[wrong][0])} of {hidden.shape[1]} patches of {size} x {size} pixels to fill"
        )
    return hidden
