"""FLUX.1: a transformer over packed latents and the tokens of T5, with the pooled text of a CLIP encoder."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import FluxPipeline
from torch import Tensor

from sa_diffusers.core.batches import Batch, take
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.losses import FlowMatchingLoss
from sa_diffusers.families.base import Configurations, register
from sa_diffusers.families.requirements import check_flow
from sa_diffusers.families.text_to_image.flows import FlowFamily


GUIDANCE = 3.5  # that models which are told the guidance are trained with, as in diffusers' scripts


class FluxLoss(FlowMatchingLoss):
    """Its model is told T s / 1000, takes 2 x 2 latents as one token, and may be told the guidance."""

    guidance: float | None = None  # None: the model is not told

    def call(self, model: Callable, noisy: Tensor, times: Tensor, conditions: Batch) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens = conditions["encoder_hidden_states"]
        places = FluxPipeline._prepare_latent_image_ids(None, height // 2, width // 2, noisy.device, noisy.dtype)
        told = None if self.guidance is None else torch.full((len(noisy),), self.guidance, device=noisy.device)
        predicted = model(
            hidden_states=FluxPipeline._pack_latents(noisy, *noisy.shape),
            timestep=times / 1000,  # whatever T is, as the pipeline has it
            guidance=told,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=places,
            **conditions,
        ).sample
        return FluxPipeline._unpack_latents(predicted, height, width, 1)


@register
class FluxFamily(FlowFamily):
    """Adapter of a FluxPipeline. Its latents [B, C, h, w] are packed only where the transformer sees them.

    Guidance is what a model is told, if it is told any ("dev"; "schnell" is not), and costs no second pass; in
    training it is told 3.5. Away from a negative prompt that says something leads guidance in earnest, by as much.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    stock = FluxPipeline
    readers = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    limits, sequence = {"tokenizer_2": 512}, ("tokenizer_2",)
    helpers = (*readers.values(), "vae", "image_encoder")
    defaults = FlowFamily.defaults | {"guidance_scale": GUIDANCE, "replay_guidance_scale": GUIDANCE}
    # Of pictures that a told guidance drew the model itself says best how they are denoised.
    defaults |= {"surrogate_target": "model"}
    loss_class, guided_passes = FluxLoss, 1

    def make_loss(self) -> FlowMatchingLoss:
        loss = super().make_loss()
        loss.guidance = GUIDANCE if self.module.config.guidance_embeds else None
        return loss

    @contextmanager
    def told_guidance(self, guidance_scale: float) -> Iterator[None]:
        before = self.loss.guidance
        self.loss.guidance = None if before is None else guidance_scale
        try:
            yield
        finally:
            self.loss.guidance = before

    @property
    def latent_shape(self) -> tuple[int, ...]:
        size = self.pipeline.vae.config.sample_size // self.pipeline.vae_scale_factor
        return self.module.config.in_channels // 4, size, size

    def encode_prompts(self, prompts: Sequence[str]) -> Batch:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.tokens_read("tokenizer_2")
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def draw_embedded(
        self,
        embedded: Batch,
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        latents = torch.empty(len(seeds), *self.latent_shape)
        avoided = texts(negative) if negative else [""] * len(seeds)
        for away in (False, True):  # apart, since a pipeline leads all of a batch away or none
            rows = [row for row, text in enumerate(avoided) if bool(text) == away]
            if not rows:
                continue
            options = {"guidance_scale": GUIDANCE, "true_cfg_scale": guidance_scale}
            options = options if away else {"guidance_scale": guidance_scale}
            away_from, own = self.embed([avoided[row] for row in rows]), [seeds[row] for row in rows]
            packed = self._draw(take(embedded, rows), away_from, own, num_inference_steps, **options)
            latents[rows] = FluxPipeline._unpack_latents(packed, *latents.shape[-2:], 1)
        return latents

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        parts = cls.parts(configurations)
        widths = {"joint_attention_dim": parts["text_encoder_2"].get("d_model")}
        widths |= {"pooled_projection_dim": parts["text_encoder"].get("hidden_size")}
        check_flow(parts["transformer"], parts["vae"], parts["scheduler"], widths, channels=4)
