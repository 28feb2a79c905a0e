"""What families share that fill holes by denoising: their encoder's features, and the noise that these are seen in."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, hidden_patches, masks
from sa_diffusers.core.losses import FillingLoss
from sa_diffusers.families.base import PixelFamily
from sa_diffusers.families.plain_parts import unwrapped


ENCODER = ("conv_in", "time_embedding", "down_blocks", "mid_block")


class FillingFamily(PixelFamily):
    """A UNet that fills holes by denoising. Its latents are the whole pictures, [B, C, H, W] in [-1, 1]."""

    component = "unet"
    capabilities = frozenset(("completion",))
    scopes = {"full": lambda name: True, "encoder": lambda name: name.split(".")[0] in ENCODER}
    example = Condition(mask="half")
    cell = 1  # height and width of what one latent stands for, in pixels

    loss: FillingLoss
    depths = property(lambda self: len(self.module.down_blocks) + 1)

    def holes(self, conditions: Sequence[Condition]) -> Tensor:
        """Holes snap outward to cells."""
        rows = self.resolution // self.cell
        cells = torch.stack([hidden_patches(mask, rows) for mask in masks(conditions)]).view(-1, 1, rows, rows)
        return cells.repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "hidden": self.holes(conditions)}

    def noised(self, batch: Batch, generator: Generator, shares: Sequence[float] = (0.0, 1.0)) -> Batch:
        first, end = (round(share * self.loss.num_terms) for share in shares)
        terms = first + torch.randint(end - first, (len(batch["sample"]),), generator=generator)
        return {**batch, "terms": terms, "noise": self.loss.sample_noise(batch, generator)}

    def features(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """What each block on the way down and the one in the middle make, [B, C, h, w] a depth."""
        return outputs_of(model, lambda: self.loss.look(model, batch))


def outputs_of(model: nn.Module, call: Callable[[], None]) -> list[Tensor]:
    """What the blocks of a UNet's encoder make, in their order, while `call` calls the whole of it.

    The whole is called, since copies of it in several processes have to know of every call.
    """
    plain, found = unwrapped(model), []
    hooks = [
        block.register_forward_hook(lambda *given: found.append(given[2]))
        for block in (*plain.down_blocks, plain.mid_block)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return [(made[0] if isinstance(made, tuple) else made).float() for made in found]
