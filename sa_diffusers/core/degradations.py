"""What a picture to complete is shown as: with a hole in it, without its colours, or coarsely."""

import torch
from torch import Tensor
from torch.nn import functional as F


DEGRADATIONS = ("mask", "grey", "coarse")  # by index; but for the first, they leave something of every pixel
COARSE = 4  # pixels of a side that become one


def degraded(images: Tensor, hidden: Tensor, kinds: Tensor) -> Tensor:
    """Images [B, C, H, W] with 0 where `hidden` [B, 1, H, W] says, or the mean of channels, or of squares of 4 pixels.

    Args:
        kinds: of each image, [B], indices into DEGRADATIONS.
    """
    grey = images.mean(1, keepdim=True).expand_as(images)
    coarse = F.interpolate(F.avg_pool2d(images, COARSE), images.shape[2:], mode="nearest")
    return torch.stack([images * ~hidden, grey, coarse])[kinds, torch.arange(len(images), device=images.device)]
