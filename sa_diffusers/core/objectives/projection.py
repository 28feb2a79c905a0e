"""Forgetting and remembering as two gradients that are kept out of each other's way."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.losses import Loss
from sa_diffusers.core.objectives.selective_amnesia import SelectiveAmnesia


class GradientProjection(SelectiveAmnesia):
    """The two terms of Selective Amnesia, each without what points along the gradient of the other; no EWC.

    With g_f and g_r the gradients of loss(surrogate | concept) and loss(replay) over all weights, flattened,

        g_f' = g_f - a g_r,  a = <g_f, g_r> / |g_r|^2   and   g_r' = g_r - b g_f,  b = <g_f, g_r> / |g_f|^2,

    the update is g_f' + g_r' ("symmetric"), or g_f' at even and g_r' at odd steps ("alternating"). PCGrad projects
    only where the two disagree (Yu et al. 2020, Alg. 1; with two terms its random order makes no difference).

    Any of these is a sum w_f g_f + w_r g_r, so the loss returned is that sum of the two losses with w_f and w_r as
    constants: its gradient is the update, its value means nothing by itself. After Adam's scaling and momentum the
    step itself is orthogonal to neither.

    A batch is that of `SelectiveAmnesia`, and for "alternating" also holds "step": the optimiser step as integers [B],
    all equal. The parts that processes and accumulation steps take are projected each by itself, and their updates
    averaged: unlike in Selective Amnesia, the result depends on the number of parts.

    Args:
        loss: the model's negative ELBO.
        parameters: those that are trained.
        mode: "symmetric" or "alternating".
        conflict_only: project only where <g_f, g_r> < 0; else g_f + g_r, or the gradient whose turn it is, as it is.

    Raises:
        ValueError: another mode; from `draw`, an alternating batch without "step".
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        mode: Literal["symmetric", "alternating"] = "symmetric",
        conflict_only: bool = False,
    ):
        if mode not in ("symmetric", "alternating"):
            raise ValueError(f"expected mode 'symmetric' or 'alternating', got {mode!r}")
        super().__init__(loss, ewc=None)
        self.parameters, self.mode, self.conflict_only = list(parameters), mode, conflict_only

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        parts = super().draw(batch, generator)
        if self.mode == "symmetric":
            return parts
        if "step" not in batch:
            raise ValueError("alternating projection needs the optimiser step: expected 'step' [B] in the batch")
        return {**parts, "step": batch["step"]}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.mean_losses(model, {name: part for name, part in batch.items() if name != "step"})
        surrogate, replay = losses.values()
        found = [gradient_of(value, self.parameters) for value in (surrogate, replay)]
        product, surrogate_norm, replay_norm = products(*found)
        removed = product.clamp(max=0) if self.conflict_only else product
        # A gradient of norm 0 has a product of 0, so the clamp makes its 0 / 0 a 0.
        tiny = torch.finfo(product.dtype).tiny
        along_replay = removed / replay_norm.square().clamp(min=tiny)  # a
        along_surrogate = removed / surrogate_norm.square().clamp(min=tiny)  # b
        if self.mode == "symmetric":
            total = (1 - along_surrogate) * surrogate + (1 - along_replay) * replay
        elif int(batch["step"][0]) % 2 == 0:
            total = surrogate - along_replay * replay
        else:
            total = replay - along_surrogate * surrogate
        cosine = product / (surrogate_norm * replay_norm).clamp(min=tiny)
        return total, {name: value.detach() for name, value in losses.items()} | {"gradient_cosine": cosine}

    def attach(self, parameters: Mapping[str, Tensor], module: nn.Module) -> None:
        raise ValueError(
            "projection needs the gradients of whole weights on every process; launch without FSDP2 or DeepSpeed"
        )


class HeldAdversary(SelectiveAmnesia):
    """Selective Amnesia with an adversary whose term gives way where it conflicts with what holds the rest.

    With g_a the gradient of the weighted adversary's term over all weights, flattened, and g_h that of replay and EWC,
    both weighted, a step with an adversary has

        g_a - a g_h,   a = min(0, <g_a, g_h>) / |g_h|^2,

    in the place of g_a: PCGrad's projection (Yu et al. 2020) of one of the two. As a <= 0, that is also all that holds
    1 - a times as strong, so stronger where the two conflict; AEGIS (arXiv 2602.06771) holds there alone. The loss
    keeps its value. After Adam's scaling and momentum the step itself is not orthogonal.

    A batch is that of `SelectiveAmnesia`, whole: processes and accumulation steps that share it would each project.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        means = self.mean_losses(model, batch)
        total, logs = self.total(means), {name: mean.detach() for name, mean in means.items()}
        if "adversary_loss" not in means or not torch.is_grad_enabled():
            return total, logs
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        forgets = gradient_of(self.terms["adversary"].weight * means["adversary_loss"], parameters)
        holds = self._holding(means, parameters)
        product, forgets_norm, holds_norm = products(forgets, holds)
        tiny = torch.finfo(product.dtype).tiny
        along = product.clamp(max=0) / holds_norm.square().clamp(min=tiny)  # a
        # A sum of the value 0 whose gradient is -a g_h.
        moved = [(held * (p - p.detach())).sum() for held, p in zip(holds, parameters, strict=True)]
        cosine = product / (forgets_norm * holds_norm).clamp(min=tiny)
        return total - along * torch.stack(moved).sum(), logs | {"gradient_cosine": cosine}

    def _holding(self, means: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient of replay and EWC."""
        if self.replay_weight:
            holds = gradient_of(self.replay_weight * means["replay_loss"], parameters)
        else:
            holds = [torch.zeros_like(parameter) for parameter in parameters]
        if self.ewc is not None:  # it adds to what is there, and knows its weights by themselves
            before = [parameter.grad for parameter in parameters]
            for parameter, held in zip(parameters, holds, strict=True):
                parameter.grad = held.clone()  # two may share one tensor
            self.ewc.add_gradient()
            holds = [parameter.grad for parameter in parameters]
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        return holds

    def attach(self, parameters: Mapping[str, Tensor], module: nn.Module) -> None:
        raise ValueError("robust_conflict needs the gradients of whole weights; launch without FSDP2 or DeepSpeed")


def gradient_of(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradient of a loss by each of the parameters, without a graph; the loss keeps its own."""
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(found)


def products(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """<g_1, g_2>, |g_1| and |g_2| of two gradients: three scalars."""
    product = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    norms = [torch.stack(torch._foreach_norm(list(gradient))).norm() for gradient in (first, second)]
    return product, *norms
