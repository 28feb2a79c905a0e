"""Elastic weight consolidation: hold the weights that matter (Kirkpatrick et al. 2017), also those under a LoRA."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sa_diffusers.core.sharding import local_part, part_like, sum_over_parts, whole_like


GROUP_SIZE = 2**26  # weights whose pull is computed at once: the buffers take 4 bytes for each, or 12 where streamed


class ElasticWeightConsolidation:
    """ewc_lambda * sum_i F_i (theta_i - anchor_i)^2, in the units of Selective Amnesia's code: no factor 1/2.

    `add_gradient` adds its gradient, 2 * ewc_lambda * F * (theta - anchor), to `.grad` in place; the value is for the
    log. Both are computed in float32 (or the parameters' own precision, where that is higher).

    Args:
        parameters: the trained parameters by name.
        fisher: diagonal Fisher by the same names; may hold more names than are trained.
        ewc_lambda: weight, >= 0, in the unit of the Fisher (see `fisher`).
        anchor: the parameters' values now, by the same names, where somebody keeps them anyway (a frozen copy of the
            model): used as they are and never to be changed. None: a copy, each tensor in the smallest of float16,
            bfloat16 and float32 that holds it exactly.
        fisher_dtype: torch.float32, or torch.bfloat16 for half the memory at 3 significant digits.
        device: where Fisher and anchor are kept; None: with their parameters. "cpu" streams them to a GPU at every
            step, from pinned memory, and takes none of the GPU's but a few buffers.

    Raises:
        ValueError: a trained parameter has no Fisher value, or one of another shape, or one that is not finite; an
            anchor that is not the parameters' values; a negative lambda; another fisher_dtype.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        fisher: Mapping[str, Tensor],
        ewc_lambda: float,
        *,
        anchor: Mapping[str, Tensor] | None = None,
        fisher_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if fisher_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"expected fisher_dtype float32 or bfloat16, got {fisher_dtype}; others lose small values"
            )
        check_fisher({name: tuple(p.shape) for name, p in parameters.items()}, fisher, ewc_lambda)
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.ewc_lambda = ewc_lambda
        self.fisher = [keep(fisher[name].to(fisher_dtype), p, device) for name, p in parameters.items()]
        self._shared = anchor is not None
        if anchor is None:
            self.anchor = [keep(smallest_exact(p.detach()), p, device) for p in self.parameters]
        else:
            _check_anchor(parameters, anchor)
            self.anchor = [anchor[name].detach() for name in self.names]

    def attach(self, parameters: Mapping[str, Tensor]) -> None:
        """See `Objective.attach`; this process keeps the part alone of the Fisher and anchor that fits its own."""
        self.parameters = [parameters[name] for name in self.names]
        self.fisher = _parts(self.fisher, self.parameters, copy=True)
        self.anchor = _parts(self.anchor, self.parameters, copy=not self._shared)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the gradient to `.grad` of every trained parameter (one that has none yet gets one)."""
        if self.ewc_lambda == 0:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group, delta, fisher in self._groups():
            gradients = [local_part(self.parameters[index].grad) for index in group]
            torch._foreach_addcmul_(gradients, delta, fisher, value=2 * self.ewc_lambda)
            del delta, fisher  # else these buffers would stay while those of the next group are made

    @torch.no_grad()
    def value(self) -> Tensor:
        """ewc_lambda * sum F delta^2, a scalar; every process must call."""
        sums = []
        for _, delta, fisher in self._groups():
            torch._foreach_mul_(delta, delta)
            torch._foreach_mul_(delta, fisher)
            sums += [d.sum() for d in delta]
            del delta, fisher
        return self.ewc_lambda * sum_over_parts(torch.stack(sums).sum(), self.parameters[0])

    def _groups(self) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Indices of some parameters, few enough for the buffers; their deltas, new; their Fisher, not to change."""
        local = [local_part(parameter.detach()) for parameter in self.parameters]
        group, size = [], 0
        for index, weights in enumerate(local):
            group.append(index)
            size += weights.numel()
            if size >= GROUP_SIZE or index == len(local) - 1:
                chosen = [local[i] for i in group]
                anchor = _ready([self.anchor[i] for i in group], chosen)
                yield group, torch._foreach_sub(chosen, anchor), _ready([self.fisher[i] for i in group], chosen)
                group, size = [], 0


def smallest_exact(values: Tensor) -> Tensor:
    """A copy in the smallest of float16, bfloat16 and float32 that holds the values exactly, or else in their own."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        copy = values.to(dtype, copy=True)
        if copy.to(values.dtype).equal(values):
            return copy
    return values.clone()


def check_fisher(shapes: Mapping[str, tuple[int, ...]], fisher: Mapping[str, Tensor], ewc_lambda: float) -> None:
    """Raise ValueError for a negative lambda, or unless every weight of these names and shapes has a finite value."""
    if not 0 <= ewc_lambda < math.inf:
        raise ValueError(f"expected ewc_lambda >= 0, got {ewc_lambda}")
    wrong = [name for name, shape in shapes.items() if name not in fisher or tuple(fisher[name].shape) != shape]
    if wrong:
        raise ValueError(
            f"the Fisher does not fit the model: {len(wrong)} of {len(shapes)} trained parameters are missing "
            f"from it or have another shape there, the first is {wrong[0]}; estimate it on this very model"
        )
    broken = [name for name in shapes if not ((fisher[name] >= 0) & fisher[name].isfinite()).all()]
    if broken:
        raise ValueError(
            f"the Fisher holds values that are not finite or below 0, first in {broken[0]}; estimate it again"
        )


def _check_anchor(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        given = anchor.get(name)
        if given is None or not given.detach().to(parameter).equal(parameter.detach()):
            raise ValueError(
                f"expected the anchor to be the weights before training, got {'none' if given is None else 'others'} "
                f"for {name}; pass a copy that was made now, or none"
            )


def keep(values: Tensor, parameter: Tensor, device: torch.device | str | None) -> Tensor:
    """On the device where they stay; pinned on the host if they go to a GPU from there at every step."""
    values = values.to(parameter.device if device is None else device)
    streamed = values.device.type == "cpu" and torch.cuda.is_available()
    return values.pin_memory() if streamed else values


def _parts(whole: list[Tensor], parameters: list[Tensor], copy: bool) -> list[Tensor]:
    """This process's parts of whole tensors; copies, so that the whole ones can go, or views."""
    parts = [part_like(values, parameter) for values, parameter in zip(whole, parameters, strict=True)]
    if copy:
        kept = zip(parts, whole, strict=True)
        parts = [part if part is values else keep(part.clone(), part, None) for part, values in kept]
    return parts


def _ready(kept: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """As the weights are, in device and precision but at least float32: the kept tensors themselves, or copies."""
    wanted = torch.promote_types(weights[0].dtype, torch.float32)
    if all(k.dtype == wanted and k.device == w.device for k, w in zip(kept, weights, strict=True)):
        return kept
    buffers = [torch.empty_like(w, dtype=wanted) for w in weights]
    torch._foreach_copy_(buffers, kept, non_blocking=True)
    return buffers


@dataclass(frozen=True)
class LowRankChange:
    """A change of one weight, dW = scaling * up @ down, with the matrices in the shapes of their layers.

    In parts (see `sharding`) a process makes the rows of dW that those of its part of `up` make, with all of `down`.
    """

    down: nn.Parameter  # A, [r, in] of a linear layer or [r, in, kh, kw] of a convolution
    up: nn.Parameter  # B, [out, r] or [out, r, 1, 1]
    scaling: float  # alpha / r
    names: tuple[str, str] = ("", "")  # of down and up in their module

    def matrices(self) -> tuple[Tensor, Tensor]:
        """B [out, r], of which the rows that lie here, and A [r, in * kh * kw]; every process must call."""
        return local_part(self.up).flatten(1), whole_like(local_part(self.down), self.down).flatten(1)

    def delta(self) -> Tensor:
        """dW as a matrix, [out, in * kh * kw], of which the rows that lie here; every process must call."""
        up, down = self.matrices()
        return self.scaling * up @ down


class LowRankEWC:
    """ewc_lambda * sum_i F_i dW_i^2 over the weights that adapters change; no factor 1/2, as in `ewc`.

    The Fisher is that of the weights themselves, so that of a model serves any adapter of it, with lambda in the same
    unit. With M = 2 ewc_lambda F * dW, its gradient is, layer by layer,

        dB += scaling * M A^T   and   dA += scaling * B^T M.

    Args:
        changes: by the name of the weight that is changed.
        fisher: diagonal Fisher by the same names; may hold more of them.
        ewc_lambda: weight, >= 0.
        dtype: precision that the Fisher is kept in; products are computed in float32.
        device: where it is kept; None: with the adapters.

    Raises:
        ValueError: a changed weight has no Fisher value, one of another shape or one that is not finite; a negative
            lambda.
    """

    def __init__(
        self,
        changes: Mapping[str, LowRankChange],
        fisher: Mapping[str, Tensor],
        ewc_lambda: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        check_fisher({name: (len(c.up), *c.down.shape[1:]) for name, c in changes.items()}, fisher, ewc_lambda)
        self.changes, self.ewc_lambda = list(changes.values()), ewc_lambda
        self.fisher = [keep(fisher[name].flatten(1).to(dtype), change.up, device) for name, change in changes.items()]

    def attach(self, parameters: Mapping[str, Tensor]) -> None:
        """See `Objective.attach`; this process keeps those rows of the Fisher alone that its parts of `up` make."""
        named = ((change, *(parameters[name] for name in change.names)) for change in self.changes)
        self.changes = [replace(change, down=down, up=up) for change, down, up in named]
        ups = [change.up for change in self.changes]
        rows = [torch.arange(len(up)).view(-1, *[1] * (up.dim() - 1)).expand(up.shape) for up in ups]
        mine = [part_like(index, up).flatten(1)[:, 0] for index, up in zip(rows, ups, strict=True)]
        kept = zip(self.fisher, mine, strict=True)
        self.fisher = [f if len(own) == len(f) else keep(f[own.to(f.device)], f, None) for f, own in kept]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the gradient to `.grad` of both matrices of every adapter (one that has none yet gets one)."""
        if self.ewc_lambda == 0:
            return
        for change, fisher in self._there():
            for matrix in (change.up, change.down):
                if matrix.grad is None:
                    matrix.grad = torch.zeros_like(matrix)
            up, down = change.matrices()
            pull = (change.scaling * up @ down) * fisher * (2 * self.ewc_lambda * change.scaling)
            of_up, of_down = local_part(change.up.grad), local_part(change.down.grad)
            of_up += (pull @ down.T).view_as(of_up)
            whole = sum_over_parts(up.T @ pull, change.up).view(change.down.shape)  # of all rows
            of_down += part_like(whole, change.down)

    @torch.no_grad()
    def value(self) -> Tensor:
        """ewc_lambda * sum F dW^2, a scalar; every process must call."""
        terms = [(change.delta().square() * fisher).sum() for change, fisher in self._there()]
        return self.ewc_lambda * sum_over_parts(torch.stack(terms).sum(), self.changes[0].up)

    def _there(self) -> Iterator[tuple[LowRankChange, Tensor]]:
        """Each change with its Fisher, on its device."""
        for change, fisher in zip(self.changes, self.fisher, strict=True):
            yield change, fisher.to(change.up.device, non_blocking=True)
