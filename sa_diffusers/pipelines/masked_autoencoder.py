"""Fill holes of pictures with a masked autoencoder."""

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor
from transformers import ViTMAEForPreTraining

from sa_diffusers.pipelines.own_code import OwnCodePipeline
from sa_diffusers.pipelines.pictures import patches_of, processors, read_masks, read_pictures


class MaskedAutoencoderInpaintPipeline(OwnCodePipeline):
    """Pictures and masks in, completed pictures out: what is visible stays, pixel by pixel.

    Args:
        mae: predicts pixels in [-1, 1] of square pictures, grey or RGB.

    Raises:
        ValueError: a model that predicts normalised patches, whose brightness nobody knows, or of oblong pictures.
    """

    def __init__(self, mae: ViTMAEForPreTraining):
        super().__init__()
        if (
            mae.config.norm_pix_loss
            or mae.config.num_channels not in (1, 3)
            or not isinstance(mae.config.image_size, int)
        ):
            raise ValueError(
                "expected a masked autoencoder of the pixels of square pictures with 1 or 3 channels, got "
                f"image_size {mae.config.image_size}, num_channels {mae.config.num_channels} and norm_pix_loss "
                f"{mae.config.norm_pix_loss}"
            )
        self.register_modules(mae=mae)
        self.image_processor, self.mask_processor = processors(mae.config.num_channels)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mask_image: Any,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Fill what is white in the masks. Raises ValueError: another size, mode or number; nothing or all to fill.

        Args:
            image: one or several pictures of the model's size: PIL, arrays [B, H, W, C] or tensors [B, C, H, W] in
                [0, 1].
            mask_image: one for all, or one a picture, of their size; a patch with anything above 0.5 is filled.
            generator: changes nothing: the model draws nothing at random.
            num_inference_steps: 1, since it fills all at once.
            output_type: "pil", "np" ([B, H, W, C]) or "pt" ([B, C, H, W]), both in [0, 1].
        """
        if output_type not in ("pil", "np", "pt") or num_inference_steps != 1:
            raise ValueError(
                "expected output_type 'pil', 'np' or 'pt' and num_inference_steps 1, got "
                f"{output_type!r} and {num_inference_steps}"
            )
        config = self.mae.config
        shape = config.num_channels, config.image_size, config.image_size
        images = read_pictures(self.image_processor, image, {1: ("L",), 3: ("RGB",)}[shape[0]], shape)
        masks = read_masks(self.mask_processor, mask_image, images)
        filled = self.complete(images, self.patches_of(masks))
        output = self.image_processor.postprocess(filled.cpu(), output_type)
        return ImagePipelineOutput(output) if return_dict else (output,)

    def patches_of(self, masks: Tensor) -> Tensor:
        """As `patches_of`, of the model's patches."""
        return patches_of(masks, self.mae.config.patch_size)

    @torch.no_grad()
    def complete(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] with the patches filled that `hidden` [B, L] names, the rest as it is."""
        config, size = self.mae.config, self.mae.config.patch_size
        images = images.to(self.mae.device, self.mae.dtype)
        hidden, filled, ratio = hidden.to(images.device), images.clone(), config.mask_ratio
        counts, total, rows = hidden.sum(1), hidden.shape[1], config.image_size // size
        try:
            for count in counts.unique().tolist():  # the model shows equally many patches of all that it sees at once
                same = counts == count
                config.mask_ratio = 1 - (total - count + 0.5) / total  # it rounds down
                order = hidden[same] * 2.0 + torch.arange(total, device=hidden.device) / total
                found = self.mae.unpatchify(self.mae(images[same], noise=order).logits).clamp(-1, 1)
                hole = hidden[same].view(-1, 1, rows, rows).repeat_interleave(size, 2).repeat_interleave(size, 3)
                filled[same] = torch.where(hole, found, images[same])
        finally:
            config.mask_ratio = ratio
        return filled
