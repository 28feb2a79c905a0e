"""Models that complete pictures by denoising pixels: holes, colours, detail."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import DEGRADATIONS, Condition, degraded
from sa_diffusers.core.losses import FillingLoss
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.completion.denoising import FillingFamily
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.pipelines import PixelInpaintPipeline


@register
class PixelInpaintFamily(FillingFamily):
    """Adapter of a PixelInpaintPipeline. Besides holes, `--masks` may be "grey", to be coloured, or "coarse"."""

    name = "pixel_inpaint"
    pipelines = ("PixelInpaintPipeline",)
    own_classes = (PixelInpaintPipeline,)
    sized_by = ("unet", "sample_size")
    defaults = read_yaml("bundled/families/pixel_inpaint.yaml")

    image_channels = property(attrgetter("module.config.out_channels"))
    resolution = property(attrgetter("module.config.sample_size"))

    def set_up_drawing(self, sampler: str | None) -> None:
        self.sampler = make_scheduler(sampler or self.defaults["sampler"], self.pipeline.scheduler)
        self._filling = type(self.pipeline)(self.module, self.sampler)
        self._filling.set_progress_bar_config(disable=True)

    def make_loss(self) -> FillingLoss:
        schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        alphas, predicts = schedule.alphas_cumprod, schedule.config.prediction_type
        return FillingLoss(alphas, predicts, lambda images: images, self.latent_shape)

    def holes(self, conditions: Sequence[Condition]) -> Tensor:
        """Where every pixel is degraded all of the picture."""
        if self.image_channels == 1 and any(condition.mask == "grey" for condition in conditions):
            raise ValueError("the mask grey is for pictures in RGB, got a model of grey ones; pass another")
        whole = torch.ones(1, 1, self.resolution, self.resolution, dtype=torch.bool)
        holes = [whole if c.mask in DEGRADATIONS[1:] else FillingFamily.holes(self, [c]) for c in conditions]
        return torch.cat(holes)

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {**super().batch(latents, conditions), "kinds": self._kinds(conditions)}

    def shown(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return degraded(images, self.holes(conditions), self._kinds(conditions))

    def complete(
        self, images: Tensor, conditions: Sequence[Condition], seeds: Sequence[int], steps: int | None = None
    ) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        asked = self.holes(conditions), self._kinds(conditions), generators
        with autocast_forward(self.module, self.compute_dtype):
            filled = self._filling.complete(images, *asked, steps or self.defaults["num_inference_steps"])
        return filled.float().cpu()

    @staticmethod
    def _kinds(conditions: Sequence[Condition]) -> Tensor:
        names = [c.mask if c.mask in DEGRADATIONS[1:] else DEGRADATIONS[0] for c in conditions]
        return torch.tensor([DEGRADATIONS.index(name) for name in names])

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        unet, schedule = configurations("unet"), configurations("scheduler")
        channels, given = unet.get("out_channels"), unet.get("in_channels")
        if channels not in (1, 3) or given != 2 * channels + 1:
            raise ValueError(
                f"expected a UNet with out_channels 1 or 3 and in_channels 3 or 7, got {channels} and {given}"
            )
        size, factor = unet.get("sample_size"), 2 ** (len(unet.get("block_out_channels", (64,))) - 1)
        if not isinstance(size, int) or size % factor or unet.get("num_class_embeds") or unet.get("class_embed_type"):
            raise ValueError(
                f"expected a UNet without classes, of square pictures of a size that {factor} divides, got the "
                f"sample_size {size}"
            )
        if schedule.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise ValueError(f"expected prediction_type epsilon or v_prediction, got {schedule['prediction_type']!r}")
