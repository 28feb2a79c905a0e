"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents, conditioned on CLIP text embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.families.base import Configurations, Family, register
from sa_diffusers.families.requirements import check_parts, pixels_a_latent
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.families.scopes import SCOPES, adapted_layers, is_text_map, text_maps
from sa_diffusers.io.hub import read_part
from sa_diffusers.models.precision import autocast_forward, on_device
from sa_diffusers.pipelines.safe_guidance import SAFETY_LEVELS, SafeGuidancePipeline


PIXELS_AT_ONCE = 2**20  # that the VAE takes; four pictures of 512 x 512 need 3.2 GB beside the UNet in float32


@register
class TextToImageFamily(Family):
    """Adapter of a StableDiffusionPipeline. The safety checker is never run: it would blacken samples.

    Its UNet is trained in place; everything else stays as it is. Of the samplers (see `make_scheduler`) "ddim" is the
    authors'; only deterministic ones make an image a function of its seed alone.

    Raises:
        ValueError: an unknown sampler.
    """

    name = "stable_diffusion"
    pipelines = ("StableDiffusionPipeline", "SafeGuidancePipeline")
    own_classes = (SafeGuidancePipeline,)
    component = "unet"
    helpers = ("text_encoder", "vae", "safety_checker", "image_encoder")
    scopes = SCOPES
    capabilities = frozenset(
        ("text", "guidance", "denoising", "text_maps", "safe_guidance", "token_embedding", "adapters")
    )

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        sampler: str = "dpmsolver++",
        compute_dtype: torch.dtype | None = None,
    ):
        self.pipeline, self.compute_dtype = pipeline, compute_dtype
        self.module: nn.Module = pipeline.unet
        self.device = self.module.device
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.loss = DiffusionLoss(schedule.alphas_cumprod, schedule.config.prediction_type)
        self._embeddings: dict[str, Tensor] = {}
        self.sampler = make_scheduler(sampler, pipeline.scheduler)
        self._safe = isinstance(pipeline, SafeGuidancePipeline)
        self._sampling_pipeline = (SafeGuidancePipeline if self._safe else StableDiffusionPipeline)(
            vae=None,  # it returns latents, and would compute where its first part is
            text_encoder=None,  # it gets embeddings, and would cast them to the precision of a text encoder
            tokenizer=None,
            unet=pipeline.unet,
            scheduler=self.sampler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._sampling_pipeline.vae_scale_factor = pipeline.vae_scale_factor
        self._sampling_pipeline.set_progress_bar_config(disable=True)

    @property
    def resolution(self) -> int:
        """Height and width, in pixels, that the UNet was trained for."""
        return self.module.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        size = self.module.config.sample_size
        return self.module.config.in_channels, size, size

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, L, D] on the CPU; each distinct prompt is encoded once (the text encoder is frozen)."""
        self._encode(prompts)
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    def prepare(self, conditions: Sequence[Condition]) -> None:
        self._encode(texts(conditions))

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that have not been yet."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if not new:
            return
        with on_device(self.pipeline.text_encoder, self.device):
            for start in range(0, len(new), 64):
                part = new[start : start + 64]
                embedded = self.pipeline.encode_prompt(part, self.device, 1, False)[0]
                self._embeddings |= dict(zip(part, embedded.cpu(), strict=True))

    @torch.no_grad()
    def draw(
        self,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        embedded = self.embed(texts(conditions))
        return self.draw_embedded(embedded, seeds, guidance_scale, num_inference_steps, negative)

    @torch.no_grad()
    def draw_embedded(
        self,
        prompt_embeds: Tensor,
        seeds: Sequence[int],
        guidance_scale: float,
        num_inference_steps: int,
        negative: Sequence[Condition] | None = None,
    ) -> Tensor:
        """`draw` for text embeddings [B, L, D] in place of conditions, such as those of no words at all."""
        avoided = texts(negative) if negative else [""] * len(prompt_embeds)
        with autocast_forward(self.module, self.compute_dtype):
            latents = self._sampling_pipeline(
                prompt_embeds=prompt_embeds.to(self.device),
                negative_prompt_embeds=self.embed(avoided).to(self.device),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                height=self.resolution,
                width=self.resolution,
                output_type="latent",
                **self._safety(num_inference_steps),
            ).images
        return latents.float().cpu()

    def _safety(self, num_inference_steps: int) -> dict:
        """What a SafeGuidancePipeline is called with besides; its warm-up is the paper's share of the steps."""
        if not self._safe:
            return {}
        config = self.pipeline.config
        settings = SAFETY_LEVELS[config.safety_level].for_steps(num_inference_steps)
        return {"safety": settings, "safety_concept_embeds": self.embed([config.safety_concept]).to(self.device)}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = latents.split(self._images_at_once(self.pipeline.vae_scale_factor**2 * latents.shape[-2:].numel()))
        with on_device(self.pipeline.vae, self.device) as vae:
            scaled = (part.to(vae.device, vae.dtype) / vae.config.scaling_factor for part in parts)
            return torch.cat([vae.decode(part).sample.float().clamp(-1, 1).cpu() for part in scaled])

    @torch.no_grad()
    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        parts = images.split(self._images_at_once(images.shape[-2:].numel()))
        with on_device(self.pipeline.vae, self.device) as vae:
            found = [vae.encode(part.to(vae.device, vae.dtype)) for part in parts]
        if not hasattr(found[0], "latent_dist"):  # a tiny autoencoder, which has no posterior
            return (torch.cat([part.latents for part in found]) * vae.config.scaling_factor).float().cpu()
        mean, std = (torch.cat([getattr(part.latent_dist, name) for part in found]) for name in ("mean", "std"))
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return ((mean + std * noise) * vae.config.scaling_factor).float().cpu()

    @staticmethod
    def _images_at_once(pixels: int) -> int:
        return max(1, PIXELS_AT_ONCE // pixels)

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "encoder_hidden_states": self.embed(texts(conditions)).float()}

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        parts = {part: configurations(part) for part in ("tokenizer", "text_encoder", "unet", "vae", "scheduler")}
        missing = [name for name, part in parts.items() if part["_class_name"] is None]
        if missing:
            raise ValueError(f"the pipeline has no {' and no '.join(missing)}; load it with all of its components")
        check_parts(parts["unet"], parts["vae"], parts["scheduler"], parts["text_encoder"])

    @classmethod
    def resolution_of(cls, source: str) -> int | None:
        size = read_part(source, "unet").get("sample_size")
        return size * pixels_a_latent(read_part(source, "vae")) if isinstance(size, int) else None

    def reads_text(self, name: str) -> bool:
        """Whether a weight or layer is one of `text_maps`, by its name."""
        return is_text_map(name.removesuffix(".weight"))

    def text_maps(self) -> dict[str, nn.Linear]:
        """The layers whose weights read text embeddings as they are, by name. Raises ValueError: adapters on them."""
        return text_maps(self.module)

    def last_word(self, prompt: str) -> int:
        """Position of a prompt's last token before the end token; of the start token for an empty prompt."""
        tokenizer = self.pipeline.tokenizer
        prompt = self.pipeline.maybe_convert_prompt(prompt, tokenizer)  # as `embed` does
        return len(tokenizer(prompt, truncation=True).input_ids) - 2

    def adapted_layers(self, scope: str, targets: str) -> list[str]:
        """Names of the layers that get an adapter, see `scopes.adapted_layers`."""
        return adapted_layers(self.module, scope, targets)

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write an adapter as diffusers' `load_lora_weights` reads it; `metadata` is peft's configuration of it."""
        self.pipeline.save_lora_weights(folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=metadata)

    def safely_guided(self, concept: str, level: str, sampler: str) -> "TextToImageFamily":
        """The same model in a pipeline that is led away from a text while it draws; `level` of SAFETY_LEVELS."""
        pipeline = SafeGuidancePipeline(
            **self.pipeline.components,
            requires_safety_checker=self.pipeline.config.requires_safety_checker,
            safety_concept=concept,
            safety_level=level,
        )
        return type(self)(pipeline, sampler, self.compute_dtype)
