"""Masked autoencoders that complete pictures: conditions are masks, and latents are the pictures themselves."""

from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import CompletionLoss
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.completion.patches import PatchFamily
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.pipelines import MaskedAutoencoderInpaintPipeline


@register
class MaskedAutoencoderFamily(PatchFamily):
    """Adapter of a MaskedAutoencoderInpaintPipeline. Its latents are the whole pictures, [B, C, H, W] in [-1, 1].

    It draws nothing from nothing, so it has no `draw`: it completes. Its positions are constants of the architecture,
    which no scope trains.
    """

    name = "masked_autoencoder"
    pipelines = ("MaskedAutoencoderInpaintPipeline",)
    own_classes = (MaskedAutoencoderInpaintPipeline,)
    sized_by = ("mae", "image_size")
    component = "mae"
    scopes = {
        "full": lambda name: not name.endswith(("position_embeddings", "decoder_pos_embed")),
        "encoder": lambda name: name.startswith("vit.") and not name.endswith("position_embeddings"),
    }
    defaults = read_yaml("bundled/families/masked_autoencoder.yaml")

    image_channels = property(attrgetter("module.config.num_channels"))
    resolution = property(attrgetter("module.config.image_size"))
    rows = property(lambda self: self.resolution // self.module.config.patch_size)

    def make_loss(self) -> CompletionLoss:
        return CompletionLoss(self.module.config.patch_size)

    def complete(
        self, images: Tensor, conditions: Sequence[Condition], seeds: Sequence[int], steps: int | None = None
    ) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] with what masks hide filled; seeds and steps do nothing."""
        with autocast_forward(self.module, self.compute_dtype):
            return self.pipeline.complete(images, self.hidden(conditions)).float().cpu()

    def features(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """What the encoder of the module, or of a copy of it, makes of a batch: one [B, positions, D]."""
        return [self.loss.features(model, batch)]

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        size, patch = (configurations("mae").get(name) for name in ("image_size", "patch_size"))
        if not isinstance(size, int) or not isinstance(patch, int) or size % patch or size // patch < 2:
            raise ValueError(
                f"expected a masked autoencoder of square pictures that its patches divide, got image_size {size} and "
                f"patch_size {patch}"
            )
