"""The conditional VAE: conditions are its classes, and its latents are the images themselves."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, classes
from sa_diffusers.core.losses import VAELoss
from sa_diffusers.families.base import PixelFamily, register
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.pipelines import ConditionalVAEPipeline


@register
class ConditionalVAEFamily(PixelFamily):
    """Adapter of a ConditionalVAEPipeline. What the loss sees are images [B, C, H, W] in [0, 1].

    There is no sampler to choose: an image is one pass through the decoder, which computes in the weights' own dtype.
    """

    name = "conditional_vae"
    pipelines = ("ConditionalVAEPipeline",)
    own_classes = (ConditionalVAEPipeline,)
    component = "vae"
    capabilities = frozenset(("labels", "prior"))
    defaults = read_yaml("bundled/families/conditional_vae.yaml")

    labels = property(attrgetter("pipeline.labels"))
    image_channels = property(attrgetter("module.config.num_channels"))
    resolution = property(attrgetter("module.config.image_size"))

    def make_loss(self) -> VAELoss:
        return VAELoss(self.module.config.latent_dim)

    @torch.no_grad()
    def draw(
        self,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 1,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        """The decoder's mean images [B, C, H, W] in [0, 1]. Raises ValueError where guidance is asked for."""
        avoided = [name for name in classes(negative or ()) if name != ""]
        if guidance_scale not in (0, 1) or avoided:
            raise ValueError(
                "a conditional VAE knows no guidance: expected guidance_scale 1 and no negative condition, got "
                f"{guidance_scale} and {avoided}"
            )
        labels, device = self.pipeline.class_indices(classes(conditions)), self.device
        return self.module.decode(self.prior(seeds).to(device), labels.to(device)).float().cpu()

    def prior(self, seeds: Sequence[int]) -> Tensor:
        """The z [B, latent_dim] ~ N(0, I) that `draw` decodes for these seeds."""
        size = self.loss.latent_dim
        return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] to [B, 3, H, W] in [-1, 1]; grey images get three equal channels."""
        return super().decode(2 * latents - 1)

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to [B, C, H, W] in [0, 1]; for a grey model the mean of the channels."""
        return super().encode((images + 1) / 2, generator)

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "labels": self.pipeline.class_indices(classes(conditions))}
