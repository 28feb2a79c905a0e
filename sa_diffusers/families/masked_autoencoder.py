"""Masked autoencoders that complete pictures: conditions are masks, and latents are the pictures themselves."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, hidden_patches, masks
from sa_diffusers.core.losses import CompletionLoss
from sa_diffusers.families.base import Configurations, Family, register
from sa_diffusers.io.hub import read_part
from sa_diffusers.pipelines import MaskedAutoencoderInpaintPipeline


@register
class MaskedAutoencoderFamily(Family):
    """Adapter of a MaskedAutoencoderInpaintPipeline. Its latents are the whole pictures, [B, C, H, W] in [-1, 1].

    It draws nothing from nothing, so it has no `draw`: it completes. Its positions are constants of the architecture,
    which no scope trains.
    """

    name = "masked_autoencoder"
    pipelines = ("MaskedAutoencoderInpaintPipeline",)
    own_classes = (MaskedAutoencoderInpaintPipeline,)
    component = "mae"
    capabilities = frozenset(("completion",))
    scopes = {
        "full": lambda name: not name.endswith(("position_embeddings", "decoder_pos_embed")),
        "encoder": lambda name: name.startswith("vit.") and not name.endswith("position_embeddings"),
    }
    example = Condition(mask="half")
    defaults = {
        "train_scope": "encoder",
        "surrogate": "noise",
        "ewc_lambda": 0.0,
        "empty_prompt_fraction": 0.0,
        "guidance_scale": 1.0,
        "num_inference_steps": 1,
        "sampler": "pipeline",
        "sample_batch_size": 100,
        "fisher_samples": 500,
        "num_train_steps": 150,
        "train_batch_size": 32,
        "learning_rate": 0.002,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "adam_beta2": 0.95,
        "max_grad_norm": 3.0,
        "checkpointing_steps": 150,
        "logging_steps": 10,
    }

    def __init__(
        self,
        pipeline: MaskedAutoencoderInpaintPipeline,
        sampler: str = "pipeline",
        compute_dtype: torch.dtype | None = None,
    ):
        self.pipeline, self.compute_dtype = pipeline, compute_dtype
        self.module: nn.Module = pipeline.mae
        self.device = self.module.device
        config = pipeline.mae.config
        self.loss = CompletionLoss(config.patch_size)
        self.image_channels, self.resolution = config.num_channels, config.image_size
        self.latent_shape = self.image_channels, self.resolution, self.resolution

    def complete(self, images: Tensor, conditions: Sequence[Condition], seeds: Sequence[int]) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] with what the conditions' masks hide filled; seeds say nothing."""
        return self.pipeline.complete(images, self._hidden(conditions)).float().cpu()

    def holes(self, conditions: Sequence[Condition]) -> Tensor:
        size = self.module.config.patch_size
        patches = self._hidden(conditions).view(len(conditions), 1, self.resolution // size, -1)
        return patches.repeat_interleave(size, 2).repeat_interleave(size, 3)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 3, H, W]; grey pictures get three equal channels."""
        return latents.clamp(-1, 1).expand(-1, 3, -1, -1)

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        """[B, 3, H, W] to [B, C, H, W]; for a grey model the mean of the channels."""
        return images.mean(1, keepdim=True) if self.image_channels == 1 else images

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "hidden": self._hidden(conditions)}

    def features(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """What the encoder of the module, or of a copy of it, makes of a batch: one [B, positions, D]."""
        return [self.loss.features(model, batch)]

    def _hidden(self, conditions: Sequence[Condition]) -> Tensor:
        rows = self.resolution // self.module.config.patch_size
        known = {mask: hidden_patches(mask, rows) for mask in set(masks(conditions))}
        return torch.stack([known[mask] for mask in masks(conditions)])

    @classmethod
    def check(cls, configurations: Configurations) -> None:
        size, patch = (configurations("mae").get(name) for name in ("image_size", "patch_size"))
        if not isinstance(size, int) or not isinstance(patch, int) or size % patch or size // patch < 2:
            raise ValueError(
                f"expected a masked autoencoder of square pictures that its patches divide, got image_size {size} and "
                f"patch_size {patch}"
            )

    @classmethod
    def resolution_of(cls, source: str) -> int | None:
        return read_part(source, "mae").get("image_size")
