"""What captions are encoded as with the whole of their embedding moved, as no words could."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_diffusers.core.batches import Batch, map_tensors, to
from sa_diffusers.families.base import Family


class CaptionEncoder:
    """T captions with one perturbation [N] of everything that the denoiser reads of them: all tokens, padding
    included, then the pooled text where it reads that too, of all encoders, each in units of its root mean square.
    """

    scale = 1.0

    def __init__(self, family: Family, captions: Sequence[str]):
        self.family, self.captions = family, list(captions)
        parts = family.text_parts(family.embed(self.captions[:1])).values()
        self.sizes = [part[0].numel() for part in parts]

    def start(self) -> Tensor:
        """The captions as they are, [N]."""
        return torch.zeros(sum(self.sizes))

    def __call__(self, moves: Tensor, rows: Sequence[int]) -> Batch:
        """The captions `rows` encoded, and moved; gradients pass to the moves."""
        embedded = to(self.family.embed([self.captions[row] for row in rows]), moves.device)
        moved = {}
        for part, move in zip(self.family.text_parts(embedded).values(), moves.split(self.sizes), strict=True):
            unit = part.to(moves).flatten(1).square().mean(1).sqrt().view(-1, *[1] * (part.dim() - 1))
            moved[id(part)] = part + unit * move.view(part.shape[1:])
        return map_tensors(embedded, lambda tensor: moved.get(id(tensor), tensor))
