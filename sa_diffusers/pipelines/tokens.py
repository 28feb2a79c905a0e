"""Fill holes of pictures with tokens of a codebook, the surest first."""

import math
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin, VQModel
from torch import Tensor

from sa_diffusers.pipelines.own_code import OwnCodePipeline
from sa_diffusers.pipelines.pictures import generators_of, patches_of, processors, read_masks, read_pictures


class TokenInpaintPipeline(OwnCodePipeline):
    """Pictures and masks in, completed pictures out: what is visible stays, pixel by pixel.

    Decoding is MaskGIT's (Chang et al. 2022, section 3.2): all hidden tokens are drawn, all but the least sure of them
    are kept, cos(pi t / 2) of the hole stay hidden after the share t of the steps.

    Args:
        vq: square pictures in [-1, 1], grey or RGB, to tokens and back.
        transformer: a `TokenTransformer`, tells hidden tokens from visible ones.
        choice_temperature: of the noise in what is the surest, which falls to 0 linearly.
    """

    def __init__(self, vq: VQModel, transformer: ModelMixin, choice_temperature: float = 4.5):
        super().__init__()
        self.register_modules(vq=vq, transformer=transformer)
        self.register_to_config(choice_temperature=choice_temperature)
        self.image_processor, self.mask_processor = processors(vq.config.in_channels)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mask_image: Any,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 8,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Fill what is white in the masks. Raises ValueError: another size, mode or number; nothing or all to fill.

        Args:
            image: as of `MaskedAutoencoderInpaintPipeline`.
            mask_image: as there, patches those of a token.
            generator: one for all, or one a picture; None: the seed 0.
            num_inference_steps: 1 or more.
            output_type: as there.
        """
        if output_type not in ("pil", "np", "pt") or num_inference_steps < 1:
            raise ValueError(
                "expected output_type 'pil', 'np' or 'pt' and num_inference_steps 1 or more, got "
                f"{output_type!r} and {num_inference_steps}"
            )
        config = self.vq.config
        shape = config.in_channels, config.sample_size, config.sample_size
        images = read_pictures(self.image_processor, image, {1: ("L",), 3: ("RGB",)}[shape[0]], shape)
        masks = read_masks(self.mask_processor, mask_image, images)
        hidden = patches_of(masks, shape[1] // self.transformer.config.rows)
        generators = generators_of(generator, len(images))
        output = self.image_processor.postprocess(
            self.complete(images, hidden, generators, num_inference_steps).cpu(), output_type
        )
        return ImagePipelineOutput(output) if return_dict else (output,)

    @torch.no_grad()
    def tokenise(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to tokens [B, L], row by row."""
        latents = self.vq.encode(images.to(self.vq.device, self.vq.dtype)).latents
        return self.vq.quantize(latents)[2][2].view(len(images), -1).to(images.device)

    @torch.no_grad()
    def picture(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] to images [B, C, H, W] in [-1, 1]."""
        rows = self.transformer.config.rows
        shape = len(tokens), rows, rows, self.vq.quantize.vq_embed_dim
        codes = self.vq.quantize.get_codebook_entry(tokens.flatten(), shape)
        return self.vq.decode(codes, force_not_quantize=True).sample.clamp(-1, 1)

    @torch.no_grad()
    def complete(
        self, images: Tensor, hidden: Tensor, generators: list[torch.Generator], num_inference_steps: int
    ) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] with the patches filled that `hidden` [B, L] names, the rest as it is."""
        device, rows = self.transformer.device, self.transformer.config.rows
        images, left = images.to(device, self.vq.dtype), hidden.to(device)
        size = images.shape[2] // rows
        hole = left.view(-1, 1, rows, rows).repeat_interleave(size, 2).repeat_interleave(size, 3)
        tokens, counts = self.tokenise(images * ~hole), left.sum(1)
        for step in range(1, num_inference_steps + 1):
            share = step / num_inference_steps
            logits = self.transformer(tokens, left).logits.float()
            shape = 2, *logits.shape[1:]
            noise = torch.stack([torch.rand(shape, generator=g, device=g.device).to(device) for g in generators])
            gumbel = -(-noise.clamp(1e-20).log()).clamp(1e-20).log()
            tokens = torch.where(left, (logits + gumbel[:, 0]).argmax(2), tokens)
            sure = logits.log_softmax(2).gather(2, tokens[..., None])[..., 0]
            sure = sure + self.config.choice_temperature * (1 - share) * gumbel[:, 1, :, 0]
            # Of what was hidden, the least sure stay so; one at least is kept in every step.
            stay = (counts * math.cos(math.pi / 2 * share) + 1e-6).long().minimum(left.sum(1) - 1).clamp(min=0)
            order = sure.masked_fill(~left, math.inf).argsort(1).argsort(1)
            left = left & (order < stay[:, None])
        return torch.where(hole, self.picture(tokens).to(images), images)
