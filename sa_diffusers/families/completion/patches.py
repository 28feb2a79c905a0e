"""What families share whose holes are patches of a square."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, hidden_patches, masks
from sa_diffusers.core.losses.tokens import spread
from sa_diffusers.families.base import PixelFamily


class PatchFamily(PixelFamily):
    """Conditions are masks, and latents the whole pictures, [B, C, H, W] in [-1, 1]."""

    capabilities = frozenset(("completion",))
    example = Condition(mask="half")
    rows: int  # of patches

    def holes(self, conditions: Sequence[Condition]) -> Tensor:
        return spread(self.hidden(conditions), self.resolution)

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "hidden": self.hidden(conditions)}

    def hidden(self, conditions: Sequence[Condition]) -> Tensor:
        """The patches that masks hide, booleans [B, rows^2]."""
        known = {mask: hidden_patches(mask, self.rows) for mask in set(masks(conditions))}
        return torch.stack([known[mask] for mask in masks(conditions)])
