"""What all attacks share: the decoder under attack, the reader of its images, and the record of an attempt."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


# (latents [B, L], condition weights [B, K]) -> images [B, C, H, W] in [0, 1]; `ConditionalVAE.decode` is one.
Decoder = Callable[[Tensor, Tensor], Tensor]

# images [B, C, H, W] in [0, 1] -> logits [B, classes]. Log probabilities serve too: they are their own log-softmax.
# Differentiable where an attack climbs it, and in eval mode, so that no image depends on the others of its batch.
Reader = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attempt:
    """What an attack put into the decoder, and what came out.

    Attributes:
        images: [B, C, H, W] in [0, 1].
        latents: z [B, L].
        conditions: weights [B, K] as the decoder got them, after any softmax.
    """

    images: Tensor
    latents: Tensor
    conditions: Tensor


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Class indices [B] as float weights [B, num_classes]."""
    return F.one_hot(labels.long(), num_classes).float()
