"""What the training loop asks of an objective."""

from typing import Protocol

from torch import Generator, Tensor, nn


NestedBatch = dict  # a Batch, or a dict of them; every tensor's first dimension is a batch


class Objective(Protocol):
    """A scalar to minimise.

    `draw` adds all randomness to the whole batch of an optimiser step, before the loop cuts that batch into the parts
    of each process and accumulation step; `__call__` is then deterministic. So the result depends on neither.
    """

    def draw(self, batch: NestedBatch, generator: Generator) -> NestedBatch:
        """The batch with the noise and terms of this optimiser step added."""
        ...

    def __call__(self, model: nn.Module, batch: NestedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (a mean over the batch), and its parts for the log."""
        ...

    def add_gradient(self) -> None:
        """Add the gradient of terms that depend on the weights alone: once an optimiser step, before clipping."""
        ...

    def regularisation(self) -> dict[str, Tensor]:
        """The value of those terms for the log; called only when logging."""
        ...
