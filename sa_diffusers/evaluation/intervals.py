"""95 % intervals: how far a number would move with other images of other prompts."""

import math
from collections.abc import Hashable, Sequence

import torch
from scipy.special import bdtrc, stdtrit
from torch import Tensor


ROUNDING = 1e-5  # of probabilities in single precision
FEW = 5  # images or groups: what so few tell is no matter for the spread of what was seen
_Z, _TAIL = 1.959964, 0.975  # of 95 %
_UNKNOWN = 0.5  # groups' worth of belief that images of a group are all alike, before any event has told
Groups = Sequence[Hashable]  # what each image belongs to: its prompt, the seed of its run


def wilson_interval(mean: float, count: float) -> tuple[float, float]:
    """Interval of the mean of `count` values in [0, 1] (Wilson 1927), the wider the fewer are 0 or 1."""
    z = _Z
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    return 0.0 if mean <= 0 else max(0.0, centre - half_width), 1.0 if mean >= 1 else min(1.0, centre + half_width)


def deciding_count(limit: float) -> int:
    """How many values put Wilson's interval below `limit`, in (0, 1), where their mean is a quarter of that."""
    return math.ceil(_Z**2 * (1 - limit) / limit / 0.75**2)


def share_interval(values: Tensor | Sequence[float], groups: Groups | None = None) -> tuple[float, float]:
    """Wilson's interval of the mean of values in [0, 1], of as many trials as images of such groups are worth.

    That is N over the design effect (Kish 1965), so that pictures of few prompts do not pass for as many prompts.
    Arguments and errors are those of `mean_interval`, and values outside [0, 1] by more than rounding.
    """
    values = _one_dimensional(values)
    if values.min() < -ROUNDING or values.max() > 1 + ROUNDING:
        raise ValueError(f"expected values in [0, 1], got {values.min():g} to {values.max():g}")
    values = values.clamp(0, 1)
    mean = values.mean().item()
    count = _worth(values, _numbered(groups, len(values)), min(mean, 1 - mean))
    return wilson_interval(mean, count)


def mean_interval(
    values: Tensor | Sequence[float], groups: Groups | None = None, least: float = -math.inf
) -> tuple[float, float] | None:
    """Student's t interval of the mean of one value an image, by groups; of shares and probabilities `share_interval`.

    Equal values give an interval without width: read it beside the number of images.

    Args:
        values: [N], finite.
        groups: what each image belongs to. Images of a group share what makes them alike, so a group is one
            observation, and few groups give a wide interval. One group alone says nothing of others: then images are
            observations, and the interval is of that group.
        least: below which no value can be, and so no end of the interval.

    Returns:
        (low, high); None of a single value, which tells nothing of others.

    Raises:
        ValueError: no values, values that are not a finite [N], or groups of another length.
    """
    values = _one_dimensional(values)
    numbers = _numbered(groups, len(values))
    if len(values) == 1:
        return None
    low, high = _student(values, numbers)
    return max(low, least), high


def difference_interval(
    a: Tensor | Sequence[float], b: Tensor | Sequence[float], groups: Groups | None = None
) -> tuple[float, float] | None:
    """Interval of the mean of a - b, where a[i] and b[i] are one image's: the same prompt and seed in two models.

    Arguments, errors and None are those of `mean_interval`. Of values that are 0 or 1 it is Bonett and Price's (2012),
    which counts one image more that flips each way, and holds 0 wherever the exact sign test finds no difference: six
    flips one way are the fewest that exclude it. Where what differs comes to fewer than ten images or groups, others
    take that of flips by the largest difference if it is wider.
    """
    a, b = _one_dimensional(a), _one_dimensional(b)
    if len(a) != len(b):
        raise ValueError(f"expected as many values of each, one pair an image, got {len(a)} and {len(b)}")
    difference, numbers = a - b, _numbered(groups, len(a))
    if _is_binary(a) and _is_binary(b):
        return _interval_of_flips(difference, numbers)
    if len(difference) == 1:
        return None
    low, high = _student(difference, numbers)
    largest, apart = difference.abs().max().item(), _sums(difference.abs(), numbers)
    if largest and apart.sum() ** 2 / apart.square().sum() < 2 * FEW:  # the groups that it comes from (Kish)
        flips = _interval_of_flips(difference / largest, numbers)
        low, high = min(low, largest * flips[0]), max(high, largest * flips[1])
    return low, high


def _interval_of_flips(flips: Tensor, numbers: Tensor) -> tuple[float, float]:
    """Interval of the mean of values in [-1, 1]: adjusted Wald, with one more flip each way."""
    up, down = flips.clamp(min=0).mean().item(), flips.clamp(max=0).mean().neg().item()
    rarer = 1 - max(up, down, 1 - up - down)  # share of all but the commonest outcome
    count = _worth(flips, numbers, rarer)
    flipped, ahead = round(count * (up + down)), round(count * max(up, down))
    undecided = 2 * bdtrc(ahead - 1, flipped, 0.5) > 1 - 0.95  # of the sign test, two-sided
    up, down = ((count * share + 1) / (count + 2) for share in (up, down))
    centre = up - down
    half_width = _Z * math.sqrt((up + down - centre**2) / (count + 2))
    low, high = max(-1.0, centre - half_width), min(1.0, centre + half_width)
    return (min(low, 0.0), max(high, 0.0)) if undecided else (low, high)


def _worth(values: Tensor, numbers: Tensor, rarer: float) -> float:
    """How many independent images those of the groups are worth: N over the design effect.

    The effect is the variance of the mean by sums over groups, against that of independent images: at least 1, and at
    most as if images of a group were all alike. Half a group's weight says that they are, until events (the rarer
    outcome's share of the groups) say otherwise. Student's t in place of z widens by how few the groups are.
    """
    count, sizes = len(values), numbers.bincount()
    num_groups = len(sizes)
    if num_groups == count:
        return count
    alike = sizes.square().sum().item() / count
    sums, variance = _sums(values - values.mean(), numbers), values.var(correction=0).item()
    found = sums.square().sum().item() / count * num_groups / (num_groups - 1) / variance if variance > 0 else alike
    known = num_groups * rarer / (num_groups * rarer + _UNKNOWN)
    effect = min(max(1.0, known * found + (1 - known) * alike), alike)
    widening = float(stdtrit(num_groups - 1, _TAIL)) / _Z
    return count / min(effect * widening**2, alike)


def _student(values: Tensor, numbers: Tensor) -> tuple[float, float]:
    """The t interval of the mean, by its variance over sums of groups (of one size: that of their means)."""
    mean, count, num_groups = values.mean(), len(values), int(numbers.max()) + 1
    variance = _sums(values - mean, numbers).square().sum() / count**2 * num_groups / (num_groups - 1)
    half_width = stdtrit(num_groups - 1, _TAIL) * variance.sqrt()
    return (mean - half_width).item(), (mean + half_width).item()


def _numbered(groups: Groups | None, num_images: int) -> Tensor:
    """The number [N] of each image's group, in the order in which they appear; without groups one image each."""
    if groups is not None and len(groups) != num_images:
        raise ValueError(f"expected a group for each of {num_images} images, got {len(groups)}")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups or ()))}
    return torch.tensor([numbers[group] for group in groups or ()]) if len(numbers) > 1 else torch.arange(num_images)


def _sums(values: Tensor, numbers: Tensor) -> Tensor:
    """The sum over each group."""
    return values.new_zeros(int(numbers.max()) + 1).index_add_(0, numbers, values)


def _one_dimensional(values: Tensor | Sequence[float]) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
        what = f"shape {list(values.shape)}" + ("" if values.isfinite().all() else " with NaN or infinity")
        raise ValueError(f"expected at least one value, one an image and all of them finite, got {what}")
    return values


def _is_binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())
