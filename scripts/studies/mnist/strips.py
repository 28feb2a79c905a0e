"""Figures of rows of small images with a name before each row and a caption beneath each image."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from torch import Tensor


IMAGE_INCHES, GAP_INCHES = 0.62, 0.04  # wide enough for a caption such as "step 1000"
LABEL_INCHES, LINE_INCHES = 1.5, 0.15


@dataclass(frozen=True)
class Strip:
    """A row: its name, grey images [N, 1, H, W] in [0, 1], and none or one caption for each."""

    label: str
    images: Tensor
    captions: Sequence[str] = ()


def strips_figure(strips: Sequence[Strip], title: str) -> Figure:
    """One row a strip, all images at one scale of grey.

    Raises:
        ValueError: no strips, an empty one, or another number of captions than of images.
    """
    if not strips or any(len(strip.images) == 0 for strip in strips):
        raise ValueError("expected at least one strip, each with at least one image")
    for strip in strips:
        if strip.captions and len(strip.captions) != len(strip.images):
            raise ValueError(f"expected a caption an image, got {len(strip.captions)} for {len(strip.images)}")
    columns = max(len(strip.images) for strip in strips)
    heights = [IMAGE_INCHES + LINE_INCHES * _lines(strip) + 2 * GAP_INCHES for strip in strips]
    width, height = LABEL_INCHES + (IMAGE_INCHES + GAP_INCHES) * columns, sum(heights)
    figure = Figure(figsize=(max(width, 7), height + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    # One axis, in inches from its upper left corner: an axis for each image would take seconds to lay out.
    axis = figure.add_subplot()
    top = 0.0
    for strip, own_height in zip(strips, heights, strict=True):
        bottom = top + IMAGE_INCHES
        axis.text(LABEL_INCHES - 0.06, (top + bottom) / 2, strip.label, ha="right", va="center", fontsize=9)
        for column, image in enumerate(strip.images):
            left = LABEL_INCHES + column * (IMAGE_INCHES + GAP_INCHES)
            extent = (left, left + IMAGE_INCHES, bottom, top)
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
            if strip.captions:
                place = left + IMAGE_INCHES / 2, bottom + GAP_INCHES / 2
                axis.text(*place, strip.captions[column], ha="center", va="top", fontsize=8, linespacing=1.0)
        top += own_height
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axis.set_axis_off()
    return figure


def _lines(strip: Strip) -> int:
    return max((caption.count("\n") + 1 for caption in strip.captions), default=0)
