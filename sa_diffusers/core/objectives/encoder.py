"""Forgetting in the encoder of a model that completes pictures (Li et al., ICLR 2024, arXiv 2402.00351)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch, cat
from sa_diffusers.core.objectives.base import Objective
from sa_diffusers.core.objectives.ewc import ElasticWeightConsolidation
from sa_diffusers.core.objectives.projection import gradient_of, products


Features = Callable[[nn.Module, Batch], list[Tensor]]
Noised = Callable[[Batch, torch.Generator], Batch]


class EncoderForgetting(Objective):
    """alpha MSE(E(T(x_f)), E_0(T(n))) + w MSE(E(T(x_r)), E_0(T(x_r))) + gamma |theta|_1 + EWC: the paper's Eq. 7.

    T leaves the visible part, E is the encoder, E_0 the one before forgetting, and n the surrogate of x_f. Student and
    teacher see the same mask. A batch is {"forget": Batch, "surrogate": the forget batch with n in the place of x_f},
    maybe "retain", a Batch, and "sparsity", gamma at this step [B].

    Args:
        features: what the encoder of a model makes of a batch, [B, ...] a depth; errors are means over each.
        frozen: the model before forgetting.
        weights: what is trained, for its l1 norm.
        ewc: holds the weights besides; None: nothing does.
        alpha, retain_weight: of forgetting and retaining, not below 0.
        noised: adds to a batch what the features are seen in, at random; the surrogate's is that of the forgotten.
    """

    def __init__(
        self,
        features: Features,
        frozen: nn.Module,
        weights: Mapping[str, Tensor],
        ewc: ElasticWeightConsolidation | None,
        alpha: float,
        retain_weight: float,
        noised: Noised = lambda batch, _: batch,
    ):
        self.features, self.frozen, self.weights, self.ewc, self.noised = features, frozen, weights, ewc, noised
        self.alpha, self.retain_weight = alpha, retain_weight

    def draw(self, batch: Batch, generator: torch.Generator) -> Batch:
        drawn = {name: self.noised(batch[name], generator) for name in ("forget", "retain") if name in batch}
        return {**batch, **drawn, "surrogate": {**drawn["forget"], **batch["surrogate"]}}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        kept = [batch["retain"]] if "retain" in batch else []
        with torch.no_grad():
            targets = self.targets(batch, kept)
        found = self.features(model, cat([batch["forget"], *kept]))
        errors = sum((a - b).square().flatten(1).mean(1) for a, b in zip(found, targets, strict=True)) / len(found)
        count = len(batch["forget"]["sample"])
        parts = {"forget_loss": errors[:count].mean()} | ({"retain_loss": errors[count:].mean()} if kept else {})
        total = self.combined(model, parts, [target[count:] for target in targets])
        return with_sparsity(total, parts, batch, self.weights)

    def combined(self, model: nn.Module, parts: dict[str, Tensor], kept: list[Tensor]) -> Tensor:
        """The loss of both parts; kept are targets [B, ...] a depth of what is to be retained."""
        return self.alpha * parts["forget_loss"] + self.retain_weight * parts.get("retain_loss", 0.0)

    def targets(self, batch: Batch, kept: list[Batch]) -> list[Tensor]:
        """Features [B, ...] a depth that those of the pictures to forget, and then to retain, should come to."""
        return self.features(self.frozen, cat([batch["surrogate"], *kept]))


class BoundedForgetting(EncoderForgetting):
    """Forget as far as what is retained allows: min alpha f subject to r <= bound (Feng et al., arXiv 2408.01689).

    f is the loss of forgetting, and r that of retaining as a share of the mean square of the retained features. With
    g_f and g_r the gradients of alpha f and r over all weights, flattened, the update is

        g_f + b g_r,   b = |g_f| / |g_r| max(0, s - cos(g_f, g_r)),   s = clip((r - bound) / bound, -1, 1),

    the d nearest to g_f with <g_r, d> >= s |g_f| |g_r|, whose right side has the sign of what r is above its bound:
    far below it nothing is held, at the bound r may not rise, and above it has to fall. After Adam's scaling and
    momentum the step keeps that in part alone. The loss returned has this gradient, its value means nothing by itself.

    A batch is that of `EncoderForgetting` with "retain", whole: processes and accumulation steps that share it would
    each hold their part.

    Args:
        retain_weight: the bound, above 0; the other arguments are those of `EncoderForgetting`.
    """

    def combined(self, model: nn.Module, parts: dict[str, Tensor], kept: list[Tensor]) -> Tensor:
        size = torch.stack([target.square().mean() for target in kept]).mean()
        forget, retain = self.alpha * parts["forget_loss"], parts["retain_loss"] / size
        if not torch.is_grad_enabled():
            return forget + retain
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        product, forgets, retains = products(*(gradient_of(value, parameters) for value in (forget, retain)))
        over = (retain.detach() / self.retain_weight - 1).clamp(-1, 1)
        tiny = torch.finfo(product.dtype).tiny  # at the first step the norm is 0, and so is what it divides
        held = (over * forgets * retains - product).clamp(min=0) / retains.square().clamp(min=tiny)
        return forget + held * retain


def at_depths(features: Features, depths: Sequence[int]) -> Features:
    """Features at these depths alone; none: at all."""

    def chosen(model: nn.Module, batch: Batch) -> list[Tensor]:
        found = features(model, batch)
        # Where processes share the work, each weight that is trained has to have a gradient, if one of 0.
        nothing = 0 * torch.stack([part.sum() for part in found]).sum()
        return [found[depth] + nothing for depth in depths]

    return chosen if depths else features


def with_sparsity(
    total: Tensor, parts: dict[str, Tensor], batch: Batch, weights: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and its parts, with the l1 norm of the weights where the batch has "sparsity", its weight [B]."""
    if "sparsity" in batch:
        parts["l1"] = torch.stack([weight.abs().sum() for weight in weights.values()]).sum()
        total = total + batch["sparsity"].mean() * parts["l1"]
    return total, {name: part.detach() for name, part in parts.items()}
