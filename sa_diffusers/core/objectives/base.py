"""What the training loop asks of an objective."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.objectives.ewc import ElasticWeightConsolidation, LowRankEWC


class SharingFrozen(Protocol):
    """The model before forgetting, to be called like it, by the weights of the one that is trained."""

    def attach(self, module: nn.Module) -> None:
        """Take the copy that is trained in the module's place."""
        ...

    def __call__(self, *arguments: Any, **conditions: Any) -> Any: ...


Frozen = nn.Module | SharingFrozen  # a copy, or what shares its weights


class Objective(Protocol):
    """A scalar to minimise.

    `draw` adds all randomness to the whole batch of an optimiser step, before the loop cuts that batch into the parts
    of each process and accumulation step; `__call__` is then deterministic. So the result depends on neither.

    The other three are for terms that depend on the weights alone: here those of `ewc`, or none.
    """

    ewc: ElasticWeightConsolidation | LowRankEWC | None = None
    frozen: Frozen | None = None  # the model before forgetting, for those that ask it

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        """The batch with the noise and terms of this optimiser step added."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (a mean over the batch), and its parts for the log."""
        ...

    def attach(self, parameters: Mapping[str, Tensor], module: nn.Module) -> None:
        """Take the trained parameters, by name, that stand in for the module's own from now on, and their module.

        Called once, before the first step, under FSDP2 and DeepSpeed, where a copy of the module is trained: the
        values are the same, but under FSDP2 each process holds a part of them (see `sharding`), and all processes must
        call the copy together.
        """
        if self.ewc is not None:
            self.ewc.attach(parameters)
        if self.frozen is not None and not isinstance(self.frozen, nn.Module):
            self.frozen.attach(module)

    def add_gradient(self) -> None:
        """Add the gradient of terms that depend on the weights alone to `.grad`.

        Called on every process once an optimiser step, after gradients were averaged over processes and unscaled, and
        before they are clipped; under DeepSpeed before the last backward pass.
        """
        if self.ewc is not None:
            self.ewc.add_gradient()

    def regularisation(self) -> dict[str, Tensor]:
        """The value of those terms for the log; called on every process, only when logging."""
        return {} if self.ewc is None else {"ewc_penalty": self.ewc.value()}
