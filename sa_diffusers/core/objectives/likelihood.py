"""Maximum likelihood: how the base models were trained before anything is forgotten."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives.base import Objective


class Likelihood(Objective):
    """The negative ELBO at one random timestep per sample.

    Args:
        loss: the model's negative ELBO.
        snr_gamma: weights min(SNR, gamma) / SNR for noise prediction (Hang et al. 2023, Eq. 7); None: no weights.
        antithetic: the second half of a batch takes the timesteps T - 1 - t of the first half, so that every batch has
            easy and hard ones in equal shares.
    """

    def __init__(self, loss: DiffusionLoss, snr_gamma: float | None = None, antithetic: bool = False):
        self.loss, self.snr_gamma, self.antithetic = loss, snr_gamma, antithetic

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        size = len(batch["sample"])
        if self.antithetic:
            terms = self.loss.sample_terms(-(-size // 2), generator)
            terms = torch.cat([terms, self.loss.num_terms - 1 - terms])[:size]
        else:
            terms = self.loss.sample_terms(size, generator)
        return {"data": batch, "terms": terms, "noise": self.loss.sample_noise(batch, generator)}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        values = self.loss(model, batch["data"], batch["terms"], batch["noise"])
        if self.snr_gamma is not None:
            snr = self.loss.signal_to_noise(batch["terms"])
            divisor = snr if self.loss.prediction_type == "epsilon" else snr + 1
            values = values * snr.clamp(max=self.snr_gamma) / divisor
        return values.mean(), {}


class AutoencoderLikelihood(Objective):
    """Error, L1 + 2 L2, and KL of a latent autoencoder (Rombach et al. 2022, App. G, without its adversarial term).

    The model maps (images, noise) to (reconstruction, mean KL per latent value).
    """

    def __init__(self, latent_shape: tuple[int, int, int], kl_weight: float):
        self.latent_shape, self.kl_weight = latent_shape, kl_weight

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        return {**batch, "noise": torch.randn(len(batch["sample"]), *self.latent_shape, generator=generator)}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, kl = model(batch["sample"], batch["noise"])
        l1, l2 = F.l1_loss(reconstruction, batch["sample"]), F.mse_loss(reconstruction, batch["sample"])
        return l1 + 2 * l2 + self.kl_weight * kl, {"l1": l1.detach(), "kl": kl.detach()}


class CaptionMatching(Objective):
    """Symmetric InfoNCE between images and their captions (CLIP: Radford et al. 2021, Fig. 3).

    The model maps (sample, input_ids) to the logits [B, B] of every caption (column) for every image (row). A sample's
    negatives are the rest of its part of the batch, so that this depends on the number of processes and parts.
    """

    def draw(self, batch: Batch, generator: Generator) -> Batch:
        return batch

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch["sample"], batch["input_ids"])
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"matched": (logits.argmax(1) == target).float().mean().detach()}
