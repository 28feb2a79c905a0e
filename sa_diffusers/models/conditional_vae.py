"""The conditional VAE of Selective Amnesia's MNIST experiments: two multilayer perceptrons."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ConditionalVAEOutput(BaseOutput):
    """The decoder's logits [B, C, H, W], and the posterior's mean and log variance [B, latent_dim]."""

    logits: Tensor
    mean: Tensor
    log_variance: Tensor


class ConditionalVAE(ModelMixin, ConfigMixin):
    """Encoder q(z | x, c) and decoder p(x | z, c) = Bernoulli; the condition is appended to the input of both.

    A condition is a class index, [B] of integers, or a weight for each class, [B, num_classes] of floats: a one-hot
    row is the same as its index, anything else is what attacks try.

    Args:
        image_size: height and width of the images in pixels.
        hidden_sizes: widths of the encoder's hidden layers; the decoder has them in reverse.
        latent_dim: dimension of z.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 1,
        num_classes: int = 10,
        hidden_sizes: tuple[int, ...] = (512, 256),
        latent_dim: int = 8,
    ):
        super().__init__()
        pixels = num_channels * image_size**2
        self.encoder = _perceptron([pixels + num_classes, *hidden_sizes, 2 * latent_dim])
        self.decoder = _perceptron([latent_dim + num_classes, *reversed(hidden_sizes), pixels])

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (C, H, W)."""
        return self.config.num_channels, self.config.image_size, self.config.image_size

    def encode(self, sample: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x, c), each [B, latent_dim], from images [B, C, H, W] in [0, 1]."""
        hidden = self.encoder(self._append(sample.flatten(1), condition))
        mean, log_variance = hidden.chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: Tensor, condition: Tensor) -> Tensor:
        """Mean images [B, C, H, W] in [0, 1] of p(x | z, c), from z [B, latent_dim]."""
        return self._logits(latents, condition).sigmoid()

    def forward(
        self, sample: Tensor, labels: Tensor, noise: Tensor, latents: Tensor | None = None
    ) -> ConditionalVAEOutput:
        """Encode images [B, C, H, W] in [0, 1], take z = mean + std * noise [B, latent_dim], decode.

        Where `latents` [B, latent_dim] are given they are decoded instead, and the KL is reported as 0: the loss is
        then no bound in absolute value, but has the gradient of one.
        """
        if latents is not None:
            nothing = torch.zeros_like(latents)
            return ConditionalVAEOutput(self._logits(latents, labels), nothing, nothing)
        mean, log_variance = self.encode(sample, labels)
        return ConditionalVAEOutput(self._logits(mean + (log_variance / 2).exp() * noise, labels), mean, log_variance)

    def _logits(self, latents: Tensor, condition: Tensor) -> Tensor:
        return self.decoder(self._append(latents, condition)).unflatten(1, self.sample_shape)

    def _append(self, values: Tensor, condition: Tensor) -> Tensor:
        """[B, n] to [B, n + num_classes]: with a weight for each class."""
        weights = condition if condition.is_floating_point() else F.one_hot(condition, self.config.num_classes)
        return torch.cat([values, weights.to(values.dtype)], 1)


def _perceptron(widths: list[int]) -> nn.Sequential:
    """Linear layers with a ReLU between any two."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
