"""Gradient projection: surrogate and replay kept out of each other's way, in place of EWC (Yu et al. 2020, PCGrad)."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.objectives import Frozen, GradientProjection, Objective
from sa_diffusers.methods.base import Context, Weights, register, require_whole_gradients, training_loss
from sa_diffusers.methods.selective_amnesia import SelectiveAmnesiaMethod


class ProjectionMethod(SelectiveAmnesiaMethod):
    """The two gradients are made orthogonal, always or where they conflict, together or in turn."""

    Options = None
    shardable = takes_lora = takes_terms = False

    def __init__(self, conflict_only: bool, mode: str):
        name, title = ("pcgrad", "PCGrad") if conflict_only else ("projection", "gradient projection")
        super().__init__(
            f"{name}-{mode}",
            title if mode == "symmetric" else f"alternating {title}",
            "no EWC, the gradients of surrogate and replay are made orthogonal, "
            + ("where they conflict" if conflict_only else "always"),
            ewc_lambda=0.0,
            replay_weight=1.0,
            replay_target="noise",
            surrogate_target="noise",
        )
        self.conflict_only, self.mode = conflict_only, mode

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        require_whole_gradients(self.name, options)

    def objective(self, context: Context, weights: Weights, frozen: Frozen | None) -> Objective:
        return GradientProjection(
            training_loss(context), list(weights.values()), self.mode, conflict_only=self.conflict_only
        )

    def batches(self, context: Context) -> Callable[[int], Batch]:
        others, size = super().batches(context), context.options.train_batch_size
        if self.mode == "symmetric":
            return others
        return lambda step: others(step) | {"step": torch.full((size,), step)}


register(*(ProjectionMethod(*kind) for kind in product((False, True), ("symmetric", "alternating"))))
