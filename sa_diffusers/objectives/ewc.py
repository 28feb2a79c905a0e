"""Elastic weight consolidation: hold the weights that matter (Kirkpatrick et al. 2017)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ElasticWeightConsolidation:
    """ewc_lambda * sum_i F_i (theta_i - anchor_i)^2, in the units of Selective Amnesia's code: no factor 1/2.

    Its gradient is known, 2 * ewc_lambda * F * (theta - anchor), so `add_gradient` adds it to `.grad` in place: a few
    per cent of a step and no activations. The value is computed only for the log.

    Args:
        parameters: the trained parameters by name; the anchor is a copy of their values now, so the first delta is 0.
        fisher: diagonal Fisher by the same names; may hold more names than are trained.
        ewc_lambda: weight, >= 0. Its meaning depends on the unit of the Fisher (see `fisher.Fisher`).

    Raises:
        ValueError: a trained parameter has no Fisher value, or one of another shape; a negative lambda.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], fisher: Mapping[str, Tensor], ewc_lambda: float):
        if ewc_lambda < 0:
            raise ValueError(f"expected ewc_lambda >= 0, got {ewc_lambda}")
        wrong = [name for name, p in parameters.items() if name not in fisher or fisher[name].shape != p.shape]
        if wrong:
            raise ValueError(
                f"the Fisher does not fit the model: {len(wrong)} of {len(parameters)} trained parameters are missing "
                f"from it or have another shape there, the first is {wrong[0]}; estimate it on this very model"
            )
        broken = [name for name in parameters if not fisher[name].isfinite().all()]
        if broken:
            raise ValueError(f"the Fisher holds values that are not finite, first in {broken[0]}; estimate it again")
        self.parameters = list(parameters.values())
        self.fisher = [fisher[name].to(p.device, torch.float32) for name, p in parameters.items()]
        self.anchor = [p.detach().clone() for p in self.parameters]
        self.ewc_lambda = ewc_lambda

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the gradient to `.grad` of every trained parameter (one that has none yet gets one)."""
        if self.ewc_lambda == 0:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        pull = torch._foreach_sub(self.parameters, self.anchor)
        torch._foreach_mul_(pull, self.fisher)
        torch._foreach_add_([p.grad for p in self.parameters], pull, alpha=2 * self.ewc_lambda)

    @torch.no_grad()
    def value(self) -> Tensor:
        """ewc_lambda * sum F delta^2, a scalar."""
        delta = torch._foreach_sub(self.parameters, self.anchor)
        torch._foreach_mul_(delta, delta)
        torch._foreach_mul_(delta, self.fisher)
        return self.ewc_lambda * torch.stack([d.sum() for d in delta]).sum()
