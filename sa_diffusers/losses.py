"""The negative ELBO of a generative model, one value per sample, as a pure function: noise and terms are arguments.

The ELBO is a sum of `num_terms` terms (T timesteps for diffusion). Training draws one term per sample, so that its
mean estimates a T-th of the sum; the Fisher needs the gradient of the sum over all of them (fisher.py).
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor


Batch = dict[str, Tensor]  # tensors that share their first dimension, the batch; "sample" holds the data


class NegativeELBO(Protocol):
    """What the Fisher and every objective need to know about a model's training loss."""

    num_terms: int
    reduction: Literal["sum", "mean"]  # over data dimensions only, never over the batch

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        """Draw the noise that a call needs, on the device of the batch."""
        ...

    def __call__(self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        """One value per sample [B] from terms [B] (integers in [0, num_terms)) and noise [B, ...]."""
        ...


class DiffusionLoss:
    """Squared error of a denoiser at given timesteps (Ho et al. 2020, Eq. 14; for v: Salimans & Ho 2022, App. D).

    The model is called as `model(noisy, timesteps, **rest_of_batch)` and returns an object with `.sample`, as every
    UNet of diffusers does; `rest_of_batch` is what the batch holds beside "sample" (text embeddings, class labels).

    Args:
        alphas_cumprod: cumulative product of the noise schedule, [T], in (0, 1].
        prediction_type: what the model predicts, "epsilon" or "v_prediction".
        reduction: "mean" or "sum" over all dimensions but the first.

    Raises:
        ValueError: another prediction type or reduction.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str = "epsilon",
        reduction: Literal["sum", "mean"] = "mean",
    ):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"expected prediction_type 'epsilon' or 'v_prediction', got {prediction_type!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"expected reduction 'sum' or 'mean', got {reduction!r}")
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        self.reduction = reduction
        self.num_terms = len(alphas_cumprod)

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        sample = batch["sample"]
        return torch.randn(sample.shape, generator=generator, dtype=sample.dtype).to(sample.device)

    def __call__(self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        conditions = {key: value for key, value in batch.items() if key != "sample"}
        sample = batch["sample"]  #                                                           [B, C, H, W]
        alpha_bar = self.alphas_cumprod.to(sample)[terms].view(-1, *[1] * (sample.dim() - 1))  # [B, 1, 1, 1]
        signal_scale, noise_scale = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        prediction = model(signal_scale * sample + noise_scale * noise, terms, **conditions).sample
        target = noise if self.prediction_type == "epsilon" else signal_scale * noise - noise_scale * sample
        squared_error = (prediction - target).square().flatten(1)  #                          [B, C*H*W]
        return squared_error.mean(1) if self.reduction == "mean" else squared_error.sum(1)

    def signal_to_noise(self, terms: Tensor) -> Tensor:
        """alpha_bar / (1 - alpha_bar) at the given timesteps, [B]."""
        alpha_bar = self.alphas_cumprod.to(terms.device)[terms]
        return alpha_bar / (1 - alpha_bar)
