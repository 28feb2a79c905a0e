"""The parts of a small Stable Diffusion as modules that the training loop can call."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel


class TrainableAutoencoder(nn.Module):
    """An AutoencoderKL as (images, noise) -> (reconstruction, mean KL to N(0, I) per latent value)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, kl


class TrainableMatcher(nn.Module):
    """A text encoder with a small image tower on latents: (latents, token ids) -> logits [B, B], as in CLIP."""

    def __init__(self, text_encoder: CLIPTextModel, latent_channels: int, width: int = 96):
        super().__init__()
        size = text_encoder.config.projection_dim
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(text_encoder.config.hidden_size, size, bias=False)
        self.image_tower = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * width, size),
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, sample: Tensor, input_ids: Tensor) -> Tensor:
        image = nn.functional.normalize(self.image_tower(sample), dim=1)
        text = nn.functional.normalize(self.text_projection(self.text_encoder(input_ids).pooler_output), dim=1)
        return self.log_scale.exp().clamp(max=100) * image @ text.T


class TrainableTextToImage(nn.Module):
    """A denoiser behind a frozen text encoder, called like the denoiser with token ids in place of embeddings."""

    def __init__(self, denoiser: nn.Module, text_encoder: CLIPTextModel):
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder.requires_grad_(False)
        self.enable_gradient_checkpointing = denoiser.enable_gradient_checkpointing
        self.disable_gradient_checkpointing = denoiser.disable_gradient_checkpointing

    def forward(self, sample: Tensor, timestep: Tensor, input_ids: Tensor):
        with torch.no_grad():
            embeddings = self.text_encoder(input_ids)[0]
        return self.denoiser(sample, timestep, encoder_hidden_states=embeddings)
