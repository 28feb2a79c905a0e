"""Fill holes of pictures with a masked autoencoder.

A copy of this file is saved beside the weights as `pipeline.py`, so that diffusers alone loads them; so it imports
nothing of this package.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTMAEForPreTraining


FILE = "pipeline.py"


class MaskedAutoencoderInpaintPipeline(DiffusionPipeline):
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

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """As diffusers does, and this file beside it, where `from_pretrained(..., trust_remote_code=True)` looks."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        index = Path(save_directory) / self.config_name
        content = json.loads(index.read_text()) | {"_class_name": [Path(FILE).stem, type(self).__name__]}
        index.write_text(json.dumps(content, indent=2) + "\n")
        (Path(save_directory) / FILE).write_text(inspect.getsource(inspect.getmodule(type(self))))

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        """The configuration without the file to find the class in: who has this class needs no code of a folder's."""
        content = super()._dict_from_json_file(json_file)
        if isinstance(content.get("_class_name"), list):
            content["_class_name"] = content["_class_name"][1]
        return content


def read_pictures(processor: VaeImageProcessor, given: Any, modes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """[B, C, H, W] as the processor makes them. Raises ValueError: another size, mode, or range."""
    pictures = given if isinstance(given, list) else [given]
    if not pictures:
        raise ValueError("expected a picture or more, got none")
    if wrong := [p.mode for p in pictures if isinstance(p, Image) and p.mode not in modes]:
        raise ValueError(f"expected the mode {' or '.join(modes)}, got {wrong[0]}; convert the picture first")
    if not isinstance(pictures[0], Image):
        values = torch.cat([torch.as_tensor(picture).flatten().float() for picture in pictures])
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("expected values in [0, 1], got others")
    found = processor.preprocess(given)
    if tuple(found.shape[1:]) != shape:
        raise ValueError(f"expected {shape[1]} x {shape[2]} pixels in {shape[0]} channels, got {list(found.shape)}")
    return found


def processors(channels: int) -> tuple[VaeImageProcessor, VaeImageProcessor]:
    """Of pictures with so many channels, and of masks."""
    grey, alike = channels == 1, {"do_resize": False}
    pictures = VaeImageProcessor(do_convert_grayscale=grey, do_convert_rgb=False, **alike)
    return pictures, VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True, **alike)


def read_masks(processor: VaeImageProcessor, given: Any, images: Tensor) -> Tensor:
    """Masks [B, 1, H, W] for images [B, C, H, W], from one for all or one a picture. Raises as `read_pictures`."""
    masks = read_pictures(processor, given, ("1", "L", "RGB"), (1, *images.shape[2:]))
    if len(masks) not in (1, len(images)):
        raise ValueError(f"expected 1 mask or {len(images)}, got {len(masks)}")
    return masks.expand(len(images), -1, -1, -1)


def generators_of(given: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One a picture; None: the seed 0. Raises ValueError: another number."""
    one_for_all = given or torch.Generator().manual_seed(0)
    generators = given if isinstance(given, list) else [one_for_all] * count
    if len(generators) != count:
        raise ValueError(f"expected 1 generator or {count}, got {len(generators)}")
    return generators


def patches_of(masks: Tensor, size: int) -> Tensor:
    """The patches [B, L] with anything above 0 in them, of masks [B, 1, H, W]. Raises ValueError: none, or all."""
    hidden = F.max_pool2d(masks.float(), size).flatten(1) > 0
    counts = hidden.sum(1)
    if (wrong := (counts == 0) | (counts == hidden.shape[1])).any():
        raise ValueError(
            f"expected masks that leave something to fill and something to go by, got one with "
            f"{int(counts[wrong][0])} of {hidden.shape[1]} patches of {size} x {size} pixels to fill"
        )
    return hidden
