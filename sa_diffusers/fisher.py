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

    F = c (S^2 + S'^2)/2   with   c = sum U / sum (S^2 + S'^2)/2   over samples and weights.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sa_diffusers.losses import Batch, NegativeELBO
from sa_diffusers.seeding import seeded


FORMAT = "sa_diffusers-fisher-1"


class FisherMismatch(ValueError):
    """A Fisher belongs to another model or has another unit."""


@dataclass
class Fisher:
    """Diagonal Fisher values by parameter name, and how they were made.

    Attributes:
        tensors: float32, >= 0, one value a weight, in the parameters' shapes.
        metadata: model_hash, reduction, num_terms (T), prediction_type, num_samples, terms ("all" or K of each draw),
            num_evaluations (gradients of one sample at one timestep), scale (c), relative_error, seed.
    """

    tensors: dict[str, Tensor]
    metadata: dict

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the metadata stands in its header."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"format": FORMAT, "fisher": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | Path) -> "Fisher":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: there is none.
            FisherMismatch: the file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no Fisher at {path}; expected a .safetensors file such as <run>/fisher.safetensors"
            )
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise FisherMismatch(f"{path} is no Fisher of this format; its header says {header.get('format')}")
                return cls({name: file.get_tensor(name) for name in file.keys()}, json.loads(header["fisher"]))
        except (OSError, SafetensorError) as error:
            raise FisherMismatch(f"{path} is no readable safetensors file: {error}") from error

    def check(self, **expected: object) -> None:
        """Refuse to serve another model or unit.

        Args:
            expected: metadata fields that must be equal, such as model_hash, reduction, num_terms.

        Raises:
            FisherMismatch: naming every field that differs.
        """
        differing = [
            f"{key}: the Fisher has {self.metadata.get(key)!r}, this run {value!r}"
            for key, value in expected.items()
            if self.metadata.get(key) != value
        ]
        if differing:
            raise FisherMismatch(
                "the Fisher belongs to another model or unit (" + "; ".join(differing) + "); leave --fisher away to "
                "estimate it, or pass the one of this model"
            )


@dataclass
class FisherSums:
    """Sums over samples from which a Fisher is made; sums of disjoint samples add up (processes, resumed runs)."""

    square: dict[str, Tensor]  # sum over samples of (S^2 + S'^2)/2, or of S^2 with all timesteps
    totals: dict[int, tuple[float, float]] = field(
        default_factory=dict
    )  # sample -> sums over weights of that and of U

    @classmethod
    def zeros(cls, parameters: Mapping[str, Tensor]) -> "FisherSums":
        return cls({name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()})

    def finish(self, metadata: dict) -> Fisher:
        """The mean over samples, rescaled by c; the metadata is completed by what was measured on the way."""
        squares, unbiased = torch.tensor(list(self.totals.values()), dtype=torch.float64).T
        scale = float(unbiased.sum() / squares.sum()) if squares.sum() > 0 else 1.0
        count = len(squares)
        # With few samples c may come out negative: U has no sign. Then the draws carry no signal to scale by.
        if scale <= 0:
            raise ValueError(
                f"the Fisher's scale came out as {scale:.3g} from {count} samples: too few; raise --fisher_samples or "
                "--fisher_terms"
            )
        spread = unbiased.std().item() / math.sqrt(count) / abs(unbiased.mean().item()) if count > 1 else None
        tensors = {name: square * (scale / count) for name, square in self.square.items()}
        return Fisher(tensors, metadata | {"num_samples": count, "scale": scale, "relative_error": spread})


def merge(parts: Iterable[FisherSums]) -> FisherSums:
    """Add sums over disjoint sets of samples.

    Raises:
        ValueError: a sample is in two of them.
    """
    first, *rest = parts
    merged = FisherSums({name: square.clone() for name, square in first.square.items()}, dict(first.totals))
    for part in rest:
        twice = merged.totals.keys() & part.totals.keys()
        if twice:
            raise ValueError(f"sample {min(twice)} is in two of the sums to merge")
        for name, square in part.square.items():
            merged.square[name] += square
        merged.totals |= part.totals
    return merged


def estimate_fisher(
    model: nn.Module,
    loss: NegativeELBO,
    parameters: Mapping[str, nn.Parameter],
    sample: Callable[[int], Batch],
    indices: Iterable[int],
    *,
    terms: int | None,
    chunk_size: int = 50,
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
    ratio = 1.0 if terms is None else terms / num_terms
    names, tensors = list(parameters), list(parameters.values())
    for index in indices:
        batch = {key: value.to(tensors[0].device) for key, value in sample(index).items()}
        draws = []
        for draw in range(1 if terms is None else 2):
            generator = seeded(seed, "fisher", index, draw)
            chosen, weights = stratified_terms(num_terms, terms or num_terms, generator)
            draws.append(_gradient_of_sum(model, loss, tensors, batch, chosen, weights, generator, chunk_size))
        squares = [gradient.square() for gradient in draws[0]]
        cross = sum(float((s * s).sum(dtype=torch.float64)) for s in draws[0])
        if len(draws) == 2:
            squares = [(a + b.square()) / 2 for a, b in zip(squares, draws[1], strict=True)]
            cross = sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(*draws, strict=True))
        total = sum(float(square.sum(dtype=torch.float64)) for square in squares)
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the gradient of sample {index} is not finite; use float32, or look at that sample"
            )
        for name, square in zip(names, squares, strict=True):
            sums.square[name] += square
        sums.totals[index] = (total, (1 - ratio) * cross + ratio * total)
    return sums


def stratified_terms(num_terms: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One term from each of `count` strata of (nearly) equal size, and the sizes, which weight them: two [count]."""
    edges = torch.tensor([stratum * num_terms // count for stratum in range(count + 1)])
    sizes = edges.diff()
    offsets = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes).long()
    return edges[:-1] + offsets, sizes.float()


def _gradient_of_sum(
    model: nn.Module,
    loss: NegativeELBO,
    parameters: list[nn.Parameter],
    batch: Batch,
    terms: Tensor,
    weights: Tensor,
    generator: torch.Generator,
    chunk_size: int,
) -> list[Tensor]:
    """Gradient of sum_k weights_k * loss(terms_k), fresh noise a term; drawn before it is cut into chunks."""
    device = batch["sample"].device
    repeated = {key: value.expand(len(terms), *value.shape[1:]) for key, value in batch.items()}
    noise = loss.sample_noise(repeated, generator)
    gradient: list[Tensor] | None = None
    for start in range(0, len(terms), chunk_size):
        rows = slice(start, start + chunk_size)
        chunk = {key: value[rows] for key, value in repeated.items()}
        values = loss(model, chunk, terms[rows].to(device), noise[rows])
        total = (values * weights[rows].to(device)).sum()
        part = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        gradient = list(part) if gradient is None else torch._foreach_add(gradient, part)
    return gradient
