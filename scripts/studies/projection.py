"""Plain fine-tuning of keys and values whose change leaves what is retained alone: a rival in chains of requests."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from sa_diffusers import methods
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.objectives import Objective
from sa_diffusers.data.replay import spread
from sa_diffusers.families import Family
from sa_diffusers.methods.uce import embedded_rows


RETAINED, THRESHOLD = 500, 0.1  # prompts; mean square along a direction, below which it holds nothing of them


class ProjectedMethod(type(methods.get(methods.DEFAULT))):
    """The default method's objective, by adapters that read of a text only where retained prompts say nothing.

    As the gradient projection of arXiv 2511.07970, P = I - C (C^T C + eps I)^-1 C^T, but exactly: gradients, and the
    adapters after every step, are projected on the eigenvectors of the retained rows' mean k k^T below a threshold.
    """

    hook: RemovableHandle | None = None

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if not options.lora_rank:
            raise ValueError(f"{self.name} projects adapters; expected a lora_rank")

    def objective(self, context: methods.Context, weights: dict, frozen: Any) -> Objective:
        kept = [prompt for prompt in context.prompts if prompt and not context.concepts.named_in(prompt)]
        projections = projections_of(context.family, spread(kept, RETAINED, context.options.seed))
        self.hold([(one.down, projections[context.family.reads_text(name)]) for name, one in weights.items()])
        return super().objective(context, weights, frozen)

    def hold(self, pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Project these matrices now and from now on, each by its own, in place of those of a run before."""

        @torch.no_grad()
        def project(*_: Any) -> None:
            for down, projection in pairs:
                down.copy_(down @ projection)

        for down, projection in pairs:
            down.register_hook(projection.__rmatmul__)
        if self.hook is not None:
            self.hook.remove()
        self.hook = register_optimizer_step_post_hook(project)  # before the moving average takes them
        project()


def projections_of(family: Family, prompts: list[str]) -> dict[str, Tensor]:
    """Of the rows of each part of a text, [D, D]."""
    family.prepare(list(map(Condition, prompts)))
    rows = [embedded_rows(family, prompt) for prompt in prompts]
    found = {}
    for part in rows[0]:
        said = torch.cat([one[part] for one in rows]).double()
        values, vectors = torch.linalg.eigh(said.T @ said / len(said))
        free = vectors[:, values < THRESHOLD]
        found[part] = (free @ free.T).to(family.device, torch.float32)
    return found


PROJECTED = ProjectedMethod(
    "projected", "projected fine-tuning", "keys and values alone", train_scope="xattn-strict", replay_weight=0.0
)
