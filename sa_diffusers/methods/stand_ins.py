"""What takes the place of pictures to forget, of which an encoder's features are the target."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


KINDS = ("noise", "other", "nearest", "mean", "blur")  # or a folder of pictures
NOISES = ("moments", "gaussian", "normal", "uniform", "constant")


def stand_ins(
    kind: str, noise: str, images: Tensor, hidden: Tensor, pool: Tensor, forgotten: Tensor, generator: Generator
) -> Tensor:
    """Pictures in the place of others, all [B, C, H, W] in [-1, 1].

    Args:
        kind: of KINDS, or "pictures": any of the pool.
        noise: of NOISES. moments: independent pixels with the batch's mean and spread, clipped, as in the authors'
            code for tokens; gaussian: with those of each pixel in the pictures to forget; normal: N(0, 1); uniform;
            constant: the batch's mean.
        images: those that are replaced.
        hidden: the pixels that are hidden from the encoder, booleans [B, 1, H, W]: "nearest" goes by the rest.
        pool: pictures [N, C, H, W] that "other" and "nearest" are taken from.
        forgotten: all pictures to forget, [N, C, H, W].
    """
    if kind == "noise":
        return _noise(noise, images, forgotten, generator)
    if kind == "mean":
        return forgotten.mean(0, keepdim=True).expand_as(images)
    if kind == "blur":
        size = max(3, images.shape[-1] // 4 | 1)
        return F.avg_pool2d(images, size, stride=1, padding=size // 2, count_include_pad=False)
    if kind == "nearest":
        shown = (~hidden).float()
        far = torch.stack([((pool - x) * m).square().flatten(1).sum(1) for x, m in zip(images, shown, strict=True)])
        return pool[far.argmin(1)]
    return pool[torch.randint(len(pool), (len(images),), generator=generator)]


def _noise(kind: str, images: Tensor, forgotten: Tensor, generator: Generator) -> Tensor:
    if kind == "uniform":
        return 2 * torch.rand(images.shape, generator=generator) - 1
    drawn = torch.zeros_like(images) if kind == "constant" else torch.randn(images.shape, generator=generator)
    if kind == "normal":
        return drawn
    of = (forgotten.std(0), forgotten.mean(0)) if kind == "gaussian" else (images.std(), images.mean())
    return (drawn * of[0] + of[1]).clamp(-1, 1)
