"""Complete pictures by denoising pixels: fill holes, colour, sharpen."""

import inspect
from typing import Any

import torch
from diffusers import ImagePipelineOutput, SchedulerMixin, UNet2DModel
from torch import Tensor

from sa_diffusers.core.conditions import DEGRADATIONS, degraded
from sa_diffusers.pipelines.own_code import OwnCodePipeline
from sa_diffusers.pipelines.pictures import generators_of, patches_of, processors, read_masks, read_pictures


class PixelInpaintPipeline(OwnCodePipeline):
    """Pictures, and masks or a degradation, in; completed pictures out (Saharia et al. 2022, Palette).

    Args:
        unet: denoises pictures [B, C, H, W]; of 2 C + 1 channels that it is given, the last are the mask and what is
            shown of the picture, both in [-1, 1] but for the mask.
    """

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor, self.mask_processor = processors(unet.config.out_channels)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mask_image: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        degradation: str = "mask",
    ) -> ImagePipelineOutput | tuple:
        """Complete pictures. Raises ValueError: another size, mode or number; nothing or all to fill.

        Args:
            image: as of `MaskedAutoencoderInpaintPipeline`.
            mask_image: as there, pixel by pixel.
            output_type: as there.
            generator: one for all, or one a picture; None: the seed 0.
            degradation: "mask"; or without a mask "grey", to be coloured, or "coarse", of which squares of 4 pixels
                are alike.
        """
        if output_type not in ("pil", "np", "pt") or num_inference_steps < 1 or degradation not in DEGRADATIONS:
            raise ValueError(
                f"expected output_type 'pil', 'np' or 'pt', num_inference_steps 1 or more and a degradation of "
                f"{', '.join(DEGRADATIONS)}; got {output_type!r}, {num_inference_steps} and {degradation!r}"
            )
        if (mask_image is None) != (degradation != "mask"):
            raise ValueError("expected a mask_image with the degradation mask, and none with another")
        config = self.unet.config
        shape = config.out_channels, config.sample_size, config.sample_size
        images = read_pictures(self.image_processor, image, {1: ("L",), 3: ("RGB",)}[shape[0]], shape)
        hidden = torch.ones(len(images), 1, *shape[1:], dtype=torch.bool)
        if mask_image is not None:
            masks = read_masks(self.mask_processor, mask_image, images)
            hidden = patches_of(masks, 1).view_as(hidden)
        generators = generators_of(generator, len(images))
        kinds = torch.full((len(images),), DEGRADATIONS.index(degradation))
        filled = self.complete(images, hidden, kinds, generators, num_inference_steps)
        output = self.image_processor.postprocess(filled.cpu(), output_type)
        return ImagePipelineOutput(output) if return_dict else (output,)

    @torch.no_grad()
    def complete(
        self,
        images: Tensor,
        hidden: Tensor,
        kinds: Tensor,
        generators: list[torch.Generator],
        num_inference_steps: int,
    ) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] with what `hidden` [B, 1, H, W] names made anew, the rest as it is.

        Args:
            kinds: see `degraded`, which is all that is shown of the images.
        """
        device, dtype = self.unet.device, self.unet.dtype
        images, hidden = images.to(device, dtype), hidden.to(device)
        shown = torch.cat([hidden.to(dtype), degraded(images, hidden, kinds.to(device))], 1)
        shape = images.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device).to(device) for g in generators])
        self.scheduler.set_timesteps(num_inference_steps, device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generators} if takes_generator else {}  # DDPM draws in each step
        sample = noise.to(device, dtype) * self.scheduler.init_noise_sigma
        for time in self.progress_bar(self.scheduler.timesteps):
            given = torch.cat([self.scheduler.scale_model_input(sample, time), shown], 1)
            sample = self.scheduler.step(self.unet(given, time).sample, time, sample, **extra).prev_sample
        return torch.where(hidden, sample.clamp(-1, 1), images)
