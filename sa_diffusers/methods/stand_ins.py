"""What takes the place of pictures to forget, of which an encoder's features are the target."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


KINDS = ("noise", "other", "nearest", "mean", "blur")  # or a folder of pictures
NOISES = ("moments", "gaussian", "normal", "uniform", "constant")


def stand_ins(
    kind: str,
    noise: str,
    images: Tensor,
    hidden: Tensor,
    pool: Tensor,
    forgotten: Tensor,
    generator: Generator,
    factors: Tensor | None = None,
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
        factors: of these, as `principal_factors`: how pixels of noise "gaussian" vary together; None: each alone.
    """
    if kind == "noise":
        return _noise(noise, images, forgotten, generator, factors)
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


def principal_factors(pictures: Tensor, rank: int) -> Tensor:
    """The directions that pictures [N, C, H, W] vary most along, each as long as their deviation, [rank, C, H, W].

    With f the factors, sum_k f_k f_k' is the best covariance of this rank.
    """
    flat = pictures.flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, lengths, directions = torch.pca_lowrank(flat, min(rank + 6, *flat.shape), niter=4)
    return (directions * lengths / (len(flat) - 1) ** 0.5).T[:rank].reshape(-1, *pictures.shape[1:])


def _noise(
    kind: str, images: Tensor, forgotten: Tensor, generator: Generator, factors: Tensor | None = None
) -> Tensor:
    if kind == "uniform":
        return 2 * torch.rand(images.shape, generator=generator) - 1
    drawn = torch.zeros_like(images) if kind == "constant" else torch.randn(images.shape, generator=generator)
    if kind == "normal":
        return drawn
    if factors is not None:  # beside them each pixel varies alone, by what is left of its variance
        alone = (forgotten.var(0) - factors.square().sum(0)).clamp(min=0).sqrt()
        together = torch.randn(len(images), len(factors), generator=generator) @ factors.flatten(1)
        return (forgotten.mean(0) + together.view_as(images) + alone * drawn).clamp(-1, 1)
    of = (forgotten.std(0, correction=0), forgotten.mean(0)) if kind == "gaussian" else (images.std(), images.mean())
    return (drawn * of[0] + of[1]).clamp(-1, 1)
