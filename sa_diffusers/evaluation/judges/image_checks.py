"""What every judge of images asks of them before it starts."""

from torch import Tensor


def check_images(images: Tensor) -> None:
    """Raise ValueError for anything but a float tensor [N, 3, H, W] in [-1, 1]."""
    what = None
    if images.dim() != 4 or images.shape[1] != 3:
        what = f"shape {list(images.shape)}"
    elif not images.is_floating_point():
        what = f"{images.dtype}; take uint8 / 127.5 - 1"
    elif len(images) and not bool(images.isfinite().all()):
        what = "NaN or infinity: the model that drew them is broken"
    elif len(images) and images.abs().max() > 1 + 1e-3:  # what rounding to half precision may add
        what = f"values from {images.min():.3g} to {images.max():.3g}; clamp or scale them"
    if what is not None:
        raise ValueError(f"expected images [N, 3, H, W] of floats in [-1, 1], got {what}")
