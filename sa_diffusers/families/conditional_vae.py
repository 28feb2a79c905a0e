"""The conditional VAE: conditions are its classes, and its latents are the images themselves."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition, classes
from sa_diffusers.core.losses import VAELoss
from sa_diffusers.families.base import Family, register
from sa_diffusers.pipelines import ConditionalVAEPipeline


@register
class ConditionalVAEFamily(Family):
    """Adapter of a ConditionalVAEPipeline. What the loss sees are images [B, C, H, W] in [0, 1].

    There is no sampler to choose: an image is one pass through the decoder, which computes in the weights' own dtype.
    """

    name = "conditional_vae"
    pipelines = ("ConditionalVAEPipeline",)
    own_classes = (ConditionalVAEPipeline,)
    component = "vae"
    capabilities = frozenset(("labels", "prior"))
    defaults = {
        "replay_prompts": "labels",
        "empty_prompt_fraction": 0.0,
        "replay_negative": "none",
        "replay_target": "noise",
        "fresh_samples": True,
        "latents": "drawn",
        "num_samples": 20000,
        "num_surrogate_samples": 1000,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "replay_guidance_scale": 1.0,
        "sample_batch_size": 500,
        "ewc_lambda": 0.4,
        "fisher_samples": 20000,
        "fisher_terms": "all",
        "num_train_steps": 300,
        "train_batch_size": 256,
        "learning_rate": 0.001,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "max_grad_norm": None,
        "checkpointing_steps": 300,
        "logging_steps": 20,
        "eval_images_concept": 1000,
        "eval_images_class": 500,
    }

    def __init__(
        self,
        pipeline: ConditionalVAEPipeline,
        sampler: str = "pipeline",
        compute_dtype: torch.dtype | None = None,
    ):
        self.pipeline, self.compute_dtype = pipeline, compute_dtype
        self.module: nn.Module = pipeline.vae
        self.device = self.module.device
        self.loss = VAELoss(pipeline.vae.config.latent_dim)
        self.labels = pipeline.labels
        self.resolution = pipeline.vae.config.image_size
        self.latent_shape = pipeline.vae.sample_shape
        self.image_channels = self.latent_shape[0]

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
        return (2 * latents - 1).expand(-1, 3, -1, -1)

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to [B, C, H, W] in [0, 1]; for a grey model the mean of the channels."""
        images = (images + 1) / 2
        return images.mean(1, keepdim=True) if self.image_channels == 1 else images

    def batch(self, latents: Tensor, conditions: Sequence[Condition]) -> Batch:
        return {"sample": latents, "labels": self.pipeline.class_indices(classes(conditions))}
