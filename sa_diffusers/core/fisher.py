"""The diagonal Fisher: which weights matter to everything a model draws.

The paper's (Selective Amnesia, Eq. 5) is F = E_x[(sum_t g_t)^2] over the model's own samples x, where g_t is the
gradient of the loss at timestep t with fresh noise: per sample, the sum over all T timesteps *first*, then the square.
Squaring the mean gradient of a batch instead gives a small fraction of it.

Beware of the scale. The unit follows the loss: a mean over pixels gives a Fisher smaller than a sum over pixels by the
square of their number. So a lambda belongs to a unit, and the metadata records it.

The cheap estimator takes, per sample, two independent stratified draws S, S' of K timesteps each: one timestep per
stratum, weighted by the stratum's size, with fresh noise. With r = K/T, M = E[sum_t g_t] and V = Var[sum_t g_t],

    E[S S'] = M^2,   E[S^2] = M^2 + V/r + W,   and   U = (1-r) S S' + r (S^2 + S'^2)/2   has   E[U] = M^2 + V + rW,

the paper's M^2 + V but for rW, the variation of the mean gradient inside a stratum (and but for strata of unequal
size, where K does not divide T). U is noisy weight by weight, and clamping it at 0 would free weights that EWC should
hold; so it only sets the scale:

    F = c (S^2 + S'^2)/2   with   c = sum U / sum (S^2 + S'^2)/2   over samples and the weights of a tensor.

Each tensor has its own c, since signal and noise share differently in each: kept in [r, 1], its range but for sampling
error. A tensor whose sum of U is not even positive is nearly all noise, whose c is r: the c over all weights, which
those with signal decide, would be up to 1/r times too much. From n samples of d weights, chance moves c by about
1/sqrt(n d), of which the bounds keep what goes up: of all noise, c is then r + 0.4 (1 - r)/sqrt(n d) on average: .04
too high for one weight and n = 100. The metadata counts the tensors that cannot be told from all noise.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch, repeat, take, to
from sa_diffusers.core.fisher_file import Fisher, FisherMismatch  # noqa: F401 (who estimates one may have to refuse one)
from sa_diffusers.core.losses import Loss
from sa_diffusers.core.seeding import seeded


@dataclass
class FisherSums:
    """Sums over samples from which a Fisher is made; sums of disjoint samples add up (processes, resumed runs).

    Attributes:
        square: sum over samples of (S^2 + S'^2)/2, or of S^2 with all timesteps, by parameter name.
        totals: sums over samples and the weights of a tensor of that and of U, by parameter name.
        unbiased: sum over all weights of U, by sample.
        ratio: r, the share of the timesteps in a draw; 1 for all of them.
    """

    square: dict[str, Tensor]
    totals: dict[str, tuple[float, float]]
    unbiased: dict[int, float] = field(default_factory=dict)
    ratio: float = 1.0

    @classmethod
    def zeros(cls, parameters: Mapping[str, Tensor], device: torch.device | None = None) -> "FisherSums":
        """Sums of no samples, on `device` or where each parameter is."""
        square = {name: torch.zeros(p.shape, device=device or p.device) for name, p in parameters.items()}
        return cls(square, dict.fromkeys(parameters, (0.0, 0.0)))

    def finish(self, metadata: dict) -> Fisher:
        """The mean over samples, rescaled by c; the metadata is completed by what was measured on the way.

        Raises:
            ValueError: too few samples and timesteps to find the scale.
        """
        squares, unbiased = (sum(pair[i] for pair in self.totals.values()) for i in range(2))
        scale = unbiased / squares if squares > 0 else 1.0
        count = len(self.unbiased)
        # U has no sign: from few samples its sum may come out negative, and then says nothing about the scale.
        if scale <= 0:
            raise ValueError(
                f"the Fisher's scale came out as {scale:.3g} from {count} samples: too few; raise --fisher_samples or "
                "--fisher_terms"
            )
        per_sample = torch.tensor(list(self.unbiased.values()), dtype=torch.float64)
        known = count > 1 and per_sample.mean() != 0
        error = (per_sample.std() / math.sqrt(count) / per_sample.mean().abs()).item() if known else None
        scales = {n: min(1.0, max(self.ratio, u / s)) if s > 0 else 1.0 for n, (s, u) in self.totals.items()}
        tensors = {name: square * (scales[name] / count) for name, square in self.square.items()}
        chance = 2 * (1 - self.ratio) / math.sqrt(count)  # two standard errors of a scale by one weight
        noisy = sum(scales[n] < min(1.0, self.ratio + chance / math.sqrt(t.numel())) for n, t in tensors.items())
        found = {"num_samples": count, "scale": scale, "total_relative_error": error, "num_noisy_tensors": noisy}
        return Fisher(tensors, metadata | found)


def merge(parts: Iterable[FisherSums]) -> FisherSums:
    """Add sums over disjoint sets of samples; holds one of them at a time beside the result.

    Raises:
        ValueError: a sample is in two of them.
    """
    parts = iter(parts)
    part = next(parts)
    square = {name: square.clone() for name, square in part.square.items()}
    merged = FisherSums(square, dict(part.totals), dict(part.unbiased), part.ratio)
    del part
    for part in parts:
        twice = merged.unbiased.keys() & part.unbiased.keys()
        if twice:
            raise ValueError(f"sample {min(twice)} is in two of the sums to merge")
        for name, square in part.square.items():
            merged.square[name] += square
            merged.totals[name] = tuple(a + b for a, b in zip(merged.totals[name], part.totals[name], strict=True))
        merged.unbiased |= part.unbiased
    return merged


def estimate_fisher(
    model: nn.Module,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    sample: Callable[[int], Batch],
    indices: Iterable[int],
    *,
    terms: int | None,
    chunk_size: int = 50,
    loss_scale: float | None = None,
    seed: int = 0,
    sums: FisherSums | None = None,
) -> FisherSums:
    """Add the squared gradients of the samples at `indices` to `sums`.

    Args:
        model: in eval mode; on the device of its parameters.
        parameters: those to estimate, by name.
        sample: the batch of one sample, as a function of its index; its tensors have first dimension 1.
        terms: None for every timestep, the paper's estimator; else K, the timesteps in each of the two draws.
        chunk_size: timesteps in one forward pass; changes memory and speed, not the result.
        loss_scale: for float16, which would lose the gradient on its way back: the summed loss is multiplied by this
            over the largest weight of a term, and the gradient divided by as much. None in other precisions.
        seed: noise and timesteps are functions of (seed, index).
        sums: continued in place; None starts from zero.

    Raises:
        ValueError: K not in [1, T].
        FloatingPointError: a gradient is not finite.
    """
    num_terms = loss.num_terms
    if terms is not None and not 1 <= terms <= num_terms:
        raise ValueError(f"expected between 1 and {num_terms} Fisher terms, or all; got {terms}")
    sums = sums or FisherSums.zeros(parameters)
    sums.ratio = 1.0 if terms is None else terms / num_terms
    names, tensors = list(parameters), list(parameters.values())

    def gradient(index: int, batch: Batch, draw: int) -> list[Tensor]:
        generator = seeded(seed, "fisher", index, draw)
        chosen, weights = stratified_terms(num_terms, terms or num_terms, generator)
        scale = 1.0 if loss_scale is None else loss_scale / float(weights.max())
        found: list[Tensor] = []
        for part in _gradients(model, loss, tensors, batch, chosen, weights * scale, generator, chunk_size):
            part = [_widened(g, sums.square[name].device) for name, g in zip(names, part, strict=True)]
            torch._foreach_add_(found, part) if found else found.extend(part)
        if scale != 1:
            torch._foreach_div_(found, scale)
        return found

    for index in indices:
        batch = to(sample(index), tensors[0].device)
        _add_sample(sums, names, index, partial(gradient, index, batch), num_draws=1 if terms is None else 2)
    return sums


def _add_sample(
    sums: FisherSums, names: list[str], index: int, gradient: Callable[[int], list[Tensor]], num_draws: int
) -> None:
    """Add a sample's squares. All that it needs goes with it, before the next sample needs as much."""
    first = gradient(0)
    if num_draws == 2:
        # Where the sums have no room beside the model, the first draw has none beside the second either.
        first = [_move(g, sums.square[name].device) for name, g in zip(names, first, strict=True)]
    second = first if num_draws == 1 else gradient(1)
    squares, moments = [], []
    for position in range(len(names)):
        a, b = first[position], second[position]
        first[position] = second[position] = None  # a square takes the place of a gradient: there is no room for both
        square, moment = _combine(a, b)
        squares.append(square if a.device == b.device else a.copy_(square, non_blocking=True))
        moments.append(moment)
    # All at once, since on a GPU each would wait for the device; after it, all that moves to main memory has come.
    moments = torch.stack(moments).tolist()
    if not math.isfinite(sum(total for total, _ in moments)):
        raise FloatingPointError(f"the gradient of sample {index} is not finite; use float32, or look at that sample")
    sums.unbiased[index] = 0.0
    for name, (total, product), square in zip(names, moments, squares, strict=True):
        unbiased = (1 - sums.ratio) * product + sums.ratio * total
        sums.square[name] += square.to(sums.square[name].device)
        sums.totals[name] = (sums.totals[name][0] + total, sums.totals[name][1] + unbiased)
        sums.unbiased[index] += unbiased


def _combine(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(S^2 + S'^2)/2 where S' is, and the sums over its weights of that and of S S', [2] in float64."""
    first = first.to(second.device, non_blocking=True)
    a, b = first.flatten().double(), second.flatten().double()
    return (first.square() + second.square()).div_(2), torch.stack([(a @ a + b @ b) / 2, a @ b])


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from a GPU into pinned memory, several times as fast, and without waiting for it."""
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device)


def stratified_terms(num_terms: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One term from each of `count` strata of (nearly) equal size, and the sizes, which weight them: two [count]."""
    edges = torch.tensor([stratum * num_terms // count for stratum in range(count + 1)])
    sizes = edges.diff()
    offsets = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes).long()
    return edges[:-1] + offsets, sizes.float()


def _widened(gradient: Tensor, device: torch.device) -> Tensor:
    """One of half precision in float32, where the sums are: beside such weights there may be no room for it."""
    half = gradient.dtype in (torch.float16, torch.bfloat16)
    return gradient.to(device).float() if half else gradient


def _gradients(
    model: nn.Module,
    loss: Loss,
    parameters: list[nn.Parameter],
    batch: Batch,
    terms: Tensor,
    weights: Tensor,
    generator: torch.Generator,
    chunk_size: int,
) -> Iterator[list[Tensor]]:
    """That of sum_k weights_k * loss(terms_k), fresh noise a term, by chunks; drawn before it is cut into these."""
    device = batch["sample"].device
    repeated = repeat(batch, len(terms))
    noise = loss.sample_noise(repeated, generator)
    for start in range(0, len(terms), chunk_size):
        rows = slice(start, start + chunk_size)
        values = loss(model, take(repeated, rows), terms[rows].to(device), noise[rows])
        total = (values * weights[rows].to(device)).sum()
        yield list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))
