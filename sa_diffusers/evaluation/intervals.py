"""95 % intervals, by the bootstrap (Efron 1979) and Wilson's: how far a number would move with other images."""

import math
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from sa_diffusers.core.seeding import seeded


FEW = 5  # images: a mean nearer to 0 or 1 than so many of them is no matter for a bootstrap
_DRAWN_AT_ONCE = 2**22  # indices held at a time, 32 MB


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of the mean of `count` values in [0, 1] (Wilson 1927), the wider the fewer are 0 or 1."""
    z = 1.959964
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def bootstrap_interval(
    values: Tensor | Sequence[float],
    seed: int = 0,
    resamples: int = 2000,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean of one value an image.

    Resamples know nothing of what has not been seen. So values in [0, 1] whose mean is within a few images of 0 or 1
    (the mean or its complement sums up to less than 5) take Wilson's interval of their mean, of as many trials as
    there are images or groups, where that is wider. Other equal values, a single one too, give an interval without
    width: read it beside the number of images.

    Args:
        values: [N], finite.
        resamples: how many times N images (or all the groups) are drawn with replacement.
        groups: what each image belongs to (its prompt, the seed of its run). Images of a group share what makes them
            alike, so whole groups are drawn; a resample's mean is over the images of the groups in it. One group
            alone says nothing of others: then images are drawn singly, and the interval is of that group.
        confidence: how often the interval should hold the mean; 95 % by default.

    Returns:
        (low, high), of the same seed the same.

    Raises:
        ValueError: no values, values that are not a finite [N], other lengths, or resamples below 1.
    """
    values = _one_dimensional(values)
    members = _members(groups, len(values))
    low, high = _interval(values, members, 0.0 if _is_binary(values) else None, seed, resamples, confidence)
    mean = values.mean().item()
    if 0 <= values.min() and values.max() <= 1 and min(mean, 1 - mean) * len(members) < FEW and low < high:
        wilson = wilson_interval(mean, len(members))
        low, high = min(low, wilson[0]), max(high, wilson[1])
    return low, high


def difference_interval(
    a: Tensor | Sequence[float], b: Tensor | Sequence[float], *, groups: Sequence[Hashable] | None = None, **options
) -> tuple[float, float]:
    """Interval of the mean of a - b, where a[i] and b[i] are one image's: the same prompt and seed in two models.

    Arguments and errors are those of `bootstrap_interval`. Where a and b are 0 and 1 and differ everywhere by the
    same, Wilson's interval bounds how often they might differ otherwise, by as much as they can.
    """
    a, b = _one_dimensional(a), _one_dimensional(b)
    if len(a) != len(b):
        raise ValueError(f"expected as many values of each, one pair an image, got {len(a)} and {len(b)}")
    return _interval(a - b, _members(groups, len(a)), -1.0 if _is_binary(a) and _is_binary(b) else None, **options)


def _interval(
    values: Tensor,
    members: Sequence[Tensor],
    smallest: float | None,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of the mean of `values`; `smallest` is the least that they can be where they are 0 and 1 or so."""
    first = values[0].item()
    if smallest is not None and bool((values == first).all()):
        other = wilson_interval(0.0, len(members))[1]  # how often another value may come, unseen so far
        return first - other * (first - smallest), first + other * (1 - first)
    sums = torch.stack([values[group].sum() for group in members])
    sizes = torch.tensor([float(len(group)) for group in members], dtype=torch.float64)
    means = torch.cat([sums[rows].sum(1) / sizes[rows].sum(1) for rows in _draws(len(members), seed, resamples)])
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, tails).tolist()
    return low, high


def _draws(count: int, seed: int, resamples: int) -> Iterator[Tensor]:
    """Rows of `count` indices below `count`, drawn with replacement: `resamples` rows in all, in parts."""
    if resamples < 1:
        raise ValueError(f"expected resamples >= 1, got {resamples}")
    generator = seeded(seed, "bootstrap")
    at_once = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        yield torch.randint(count, (min(at_once, resamples - start), count), generator=generator)


def _members(groups: Sequence[Hashable] | None, num_images: int) -> list[Tensor]:
    """The indices of each group's images, in the order in which the groups appear; without groups one image each."""
    if groups is not None and len(groups) != num_images:
        raise ValueError(f"expected a group for each of {num_images} images, got {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups or ()):
        members.setdefault(group, []).append(index)
    if len(members) <= 1:
        return list(torch.arange(num_images)[:, None])
    return [torch.tensor(indices) for indices in members.values()]


def _one_dimensional(values: Tensor | Sequence[float]) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
        what = f"shape {list(values.shape)}" + ("" if values.isfinite().all() else " with NaN or infinity")
        raise ValueError(f"expected at least one value, one an image and all of them finite, got {what}")
    return values


def _is_binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())
