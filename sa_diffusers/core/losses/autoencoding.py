"""The losses of models that encode a picture and decode it again, the whole of it or what was hidden, in one term."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sa_diffusers.core.batches import Batch, conditions_of
from sa_diffusers.core.losses.protocol import Loss, PatchLoss


class VAELoss(Loss):
    """Cross-entropy of Bernoulli pixels + KL(q(z | x, c) || N(0, I)), one draw of z (Kingma & Welling 2014, Eq. 10).

    The model is called as `model(sample, noise=noise, **rest_of_batch)`, samples in [0, 1], and returns an object with
    `.logits` [B, ...], `.mean` and `.log_variance` [B, latent_dim]. The ELBO is a single term.

    Args:
        latent_dim: dimension of z.
    """

    num_terms = 1
    reduction: Literal["sum", "mean"] = "sum"
    prediction_type = "bernoulli"

    def __init__(self, latent_dim: int):
        self.latent_dim = latent_dim

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        sample = batch["sample"]
        return torch.randn(len(sample), self.latent_dim, generator=generator, dtype=sample.dtype).to(sample.device)

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """One value per sample [B]; there is no other target than the sample."""
        output = model(batch["sample"], noise=noise, **conditions_of(batch))
        errors = F.binary_cross_entropy_with_logits(output.logits, batch["sample"], reduction="none")
        kl = 0.5 * (output.mean.square() + output.log_variance.exp() - 1 - output.log_variance)
        return errors.flatten(1).sum(1) + kl.sum(1)


class CompletionLoss(PatchLoss):
    """Mean squared error over the hidden patches of a picture (masked autoencoders: He et al. 2022, section 3).

    The model is called as `model(sample, noise=noise)`, as ViTMAEForPreTraining of transformers: it is shown the
    patches of least noise, as many as the `mask_ratio` of its configuration leaves, and returns an object with
    `.logits` [B, L, patch_size^2 C] for all L patches. A batch holds "sample" [B, C, H, W] in [-1, 1] and "hidden"
    [B, L] of booleans, equally many in each row. The loss is a single term, without any noise.

    Args:
        patch_size: height and width of a patch in pixels.
    """

    num_terms = 1
    reduction: Literal["sum", "mean"] = "mean"
    prediction_type = "pixels"

    def __init__(self, patch_size: int):
        self.patch_size = patch_size

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        return torch.zeros(len(batch["sample"]), 0)

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        hidden, target = batch["hidden"], self.patches(batch["sample"]) if target is None else target
        errors = (self.forward(model, batch).logits - target).square().mean(2)
        return (errors * hidden).sum(1) / hidden.sum(1)

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as patches [B, L, patch_size^2 C], row by row, the channels of a pixel together."""
        size = self.patch_size
        parts = images.unfold(2, size, size).unfold(3, size, size)  # [B, C, rows, columns, size, size]
        return parts.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def features(self, model: Callable, batch: Batch) -> Tensor:
        """What the encoder makes of the visible patches, and of the whole, [B, 1 + visible, D].

        The whole model is called, since copies of it in several processes have to know of every call.
        """
        states = self.forward(model, batch, output_hidden_states=True).hidden_states[-1]
        return _plain(model).vit.layernorm(states)

    def forward(self, model: Callable, batch: Batch, **options: bool) -> Any:
        """The model's output for what a batch leaves visible. Raises ValueError: rows that hide differently much."""
        hidden, config = batch["hidden"], _plain(model).config
        total, counts = hidden.shape[1], hidden.sum(1).unique().tolist()
        if len(counts) != 1 or counts[0] in (0, total):
            raise ValueError(
                f"expected masks that hide equally many of {total} patches, not all of them, got {counts}"
            )
        order = hidden * 2.0 + torch.arange(total, device=hidden.device) / total  # visible first, row by row
        kept, before = total - counts[0], config.mask_ratio
        config.mask_ratio = 1 - (kept + 0.5) / total  # the model rounds down
        try:
            return model(batch["sample"], noise=order, **options)
        finally:
            config.mask_ratio = before


def _plain(model: Any) -> Any:
    """The model without what shares its work between processes."""
    return model.module if hasattr(model, "module") else model
