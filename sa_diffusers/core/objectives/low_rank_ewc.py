"""Elastic weight consolidation of weights that change by low-rank adapters only (LoRA, Hu et al. 2022)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sa_diffusers.core.objectives.ewc import check_fisher, keep


@dataclass(frozen=True)
class LowRankChange:
    """A change of one weight, dW = scaling * up @ down, with the matrices in the shapes of their layers."""

    down: nn.Parameter  # A, [r, in] of a linear layer or [r, in, kh, kw] of a convolution
    up: nn.Parameter  # B, [out, r] or [out, r, 1, 1]
    scaling: float  # alpha / r

    def delta(self) -> Tensor:
        """dW as a matrix, [out, in * kh * kw]."""
        return self.scaling * self.up.flatten(1) @ self.down.flatten(1)


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
        if ewc_lambda < 0:
            raise ValueError(f"expected ewc_lambda >= 0, got {ewc_lambda}")
        check_fisher({name: (len(c.up), *c.down.shape[1:]) for name, c in changes.items()}, fisher)
        self.changes, self.ewc_lambda = list(changes.values()), ewc_lambda
        self.fisher = [keep(fisher[name].flatten(1).to(dtype), change.up, device) for name, change in changes.items()]

    def attach(self, parameters: Mapping[str, Tensor]) -> None:
        raise ValueError("low-rank adapters are trained whole on every process; launch without FSDP2 or DeepSpeed")

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the gradient to `.grad` of both matrices of every adapter (one that has none yet gets one)."""
        if self.ewc_lambda == 0:
            return
        for change, fisher in self._there():
            for matrix in (change.up, change.down):
                if matrix.grad is None:
                    matrix.grad = torch.zeros_like(matrix)
            pull = change.delta() * fisher * (2 * self.ewc_lambda * change.scaling)
            change.up.grad += (pull @ change.down.flatten(1).T).view_as(change.up)
            change.down.grad += (change.up.flatten(1).T @ pull).view_as(change.down)

    @torch.no_grad()
    def value(self) -> Tensor:
        """ewc_lambda * sum F dW^2, a scalar."""
        terms = [(change.delta().square() * fisher).sum() for change, fisher in self._there()]
        return self.ewc_lambda * torch.stack(terms).sum()

    def _there(self) -> Iterator[tuple[LowRankChange, Tensor]]:
        """Each change with its Fisher, on its device."""
        for change, fisher in zip(self.changes, self.fisher, strict=True):
            yield change, fisher.to(change.up.device, non_blocking=True)
