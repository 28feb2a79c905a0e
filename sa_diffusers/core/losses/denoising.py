"""The losses of models that predict noise, a sample or a velocity from what is noisy."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

from sa_diffusers.core.batches import Batch, conditions_of
from sa_diffusers.core.losses.protocol import Loss


LOG_SNR = 8.0  # beyond this a noisy sample tells all, or nothing, whatever the condition


class DenoisingLoss(Loss):
    """Squared error of what a model predicts of signal_scale * sample + noise_scale * noise, at given terms."""

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        sample = batch["sample"]
        return torch.randn(sample.shape, generator=generator, dtype=sample.dtype).to(sample.device)

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        target = self.target(batch, terms, noise) if target is None else target
        squared_error = (self.predict(model, batch, terms, noise) - target).square().flatten(1)  # [B, C*H*W]
        return squared_error.mean(1) if self.reduction == "mean" else squared_error.sum(1)

    def predict(self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        signal_scale, noise_scale = self._scales(batch["sample"], terms)
        noisy = signal_scale * batch["sample"] + noise_scale * noise
        return self.call(model, noisy, self.times(terms), conditions_of(batch))

    def parts(self, predicted: Tensor, noisy: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """The sample and the noise that a prediction takes what is noisy for, at the given terms; -1: without noise.

        They combine to what is noisy by `scales`, and to the prediction as `target` does.
        """
        raise NotImplementedError

    def scales(self, sample: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """The scales of signal and noise at the given terms, [B, 1, ...] each; at -1, which is no term, 1 and 0."""
        clean = (terms < 0).view(-1, *[1] * (sample.dim() - 1)).to(sample.device)
        signal_scale, noise_scale = self._scales(sample, terms.clamp_min(0))
        return torch.where(clean, 1, signal_scale), torch.where(clean, 0, noise_scale)

    def divergence_terms(self, count: int) -> tuple[Tensor, Tensor]:
        """Terms at even steps of the log signal-to-noise ratio, and the weight of each, [count].

        Two predictions of noisy samples of the first differ by squares that, so weighted, sum up to the divergence in
        nats of what the two draw (Kingma et al. 2021, Eq. 17):  KL = 1/2 E int |eps_1 - eps_2|^2 d log(SNR).
        """
        signal, noise = self._scales(torch.zeros(1, dtype=torch.float64), torch.arange(self.num_terms))
        levels = 2 * (signal / noise).log().clamp(-LOG_SNR / 2, LOG_SNR / 2)
        low, step = levels.min(), (levels.max() - levels.min()) / count
        terms = (low + step * (torch.arange(count)[:, None] + 0.5) - levels).abs().argmin(1)
        # A velocity differs by as much as the noise does, divided by the scale of the signal.
        return terms, (step / 2 * (1 if self.prediction_type == "epsilon" else signal[terms] ** 2)).expand(count)

    def _scales(self, sample: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """As `scales`, of terms alone."""
        raise NotImplementedError

    @staticmethod
    def _at(levels: Tensor, sample: Tensor, terms: Tensor) -> Tensor:
        """Of one number a term, [T], those of the given terms, in the precision and dimensions of the sample."""
        return levels.to(sample)[terms].view(-1, *[1] * (sample.dim() - 1))


class DiffusionLoss(DenoisingLoss):
    """Squared error of a denoiser at given timesteps (Ho et al. 2020, Eq. 14; for v: Salimans & Ho 2022, App. D).

    The model is called as `model(noisy, timesteps, **rest_of_batch)` and returns an object with `.sample`, as every
    UNet of diffusers does; `rest_of_batch` is what the batch holds beside "sample" (text embeddings, class labels).

    Args:
        alphas_cumprod: cumulative product of the noise schedule, [T], in (0, 1].
        prediction_type: "epsilon" or "v_prediction".
        reduction: "mean" or "sum" over all dimensions but the first.

    Raises:
        ValueError: another prediction type or reduction.
    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction_type: str = "epsilon", reduction: Literal["sum", "mean"] = "mean"
    ):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"expected prediction_type 'epsilon' or 'v_prediction', got {prediction_type!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"expected reduction 'sum' or 'mean', got {reduction!r}")
        self.alphas_cumprod, self.num_terms = alphas_cumprod, len(alphas_cumprod)
        self.prediction_type, self.reduction = prediction_type, reduction

    def call(self, model: Callable, noisy: Tensor, times: Tensor, conditions: Batch) -> Tensor:
        return model(noisy, times, **conditions).sample

    def target(self, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        """The noise that was drawn, or its combination v with the samples, [B, C, H, W]."""
        if self.prediction_type == "epsilon":
            return noise
        signal_scale, noise_scale = self._scales(batch["sample"], terms)
        return signal_scale * noise - noise_scale * batch["sample"]

    def parts(self, predicted: Tensor, noisy: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        signal_scale, noise_scale = self.scales(noisy, terms)
        if self.prediction_type == "epsilon":
            return (noisy - noise_scale * predicted) / signal_scale, predicted
        return signal_scale * noisy - noise_scale * predicted, noise_scale * noisy + signal_scale * predicted

    def times(self, terms: Tensor) -> Tensor:
        return terms

    def _scales(self, sample: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar)."""
        alpha_bar = self._at(self.alphas_cumprod, sample, terms)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def signal_to_noise(self, terms: Tensor) -> Tensor:
        """alpha_bar / (1 - alpha_bar) at the given timesteps, [B]."""
        alpha_bar = self.alphas_cumprod.to(terms.device)[terms]
        return alpha_bar / (1 - alpha_bar)


def _mode(count: int, generator: Generator) -> Tensor:
    """Places in (0, 1) by Esser et al. 2024, Eq. 20, with s = 1.29."""
    places = torch.rand(count, generator=generator)
    return 1 - places - 1.29 * ((math.pi * places / 2).cos() ** 2 - 1 + places)


class FlowMatchingLoss(DenoisingLoss):
    """Squared error of a velocity on straight paths (Lipman et al. 2023; Esser et al. 2024, Eq. 13 and Sec. 3.1):

        x_s = (1 - s) x + s eps,   w(s) |v(x_s, s) - (eps - x)|^2,   with s of the scheduler's own shifted grid,

    so that terms are its noise levels, the least noisy first. Density and weight are those of diffusers' training
    scripts; the shares of terms differ in training alone, never in the sum over all of them that a Fisher is of.

    The model is called as `model(hidden_states=noisy, timestep=T s, **rest_of_batch)` and returns an object with
    `.sample`.

    Args:
        sigmas: s of each term, [T], ascending in (0, 1]; T of them, since the model is told T s.
        shift: of the grid, for the metadata of a Fisher.
        density: of the terms of training: "uniform"; or in the terms' order "logit_normal" (0, 1), or "mode" (scale
            1.29), which is heavy at both ends.
        weighting: "none"; "preconditioned", s^2 (the error of the sample that the velocity points to); "sigma_sqrt",
            1 / s^2; or "cosmap", 2 / (pi (1 - 2 s + 2 s^2)).

    Raises:
        ValueError: another density or weighting, or levels out of range.
    """

    prediction_type = "flow"
    reduction: Literal["sum", "mean"] = "mean"
    densities: dict[str, Callable[[int, Generator], Tensor]] = {
        "uniform": lambda count, generator: torch.rand(count, generator=generator),
        "logit_normal": lambda count, generator: torch.randn(count, generator=generator).sigmoid(),
        "mode": _mode,
    }
    weights = {
        "none": torch.ones_like,
        "preconditioned": torch.square,
        "sigma_sqrt": lambda sigmas: sigmas**-2,
        "cosmap": lambda sigmas: 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
    }

    def __init__(self, sigmas: Tensor, shift: float = 1.0, density: str = "uniform", weighting: str = "none"):
        if density not in self.densities or weighting not in self.weights:
            raise ValueError(
                f"expected a density of {', '.join(self.densities)} and a weighting of {', '.join(self.weights)}; got "
                f"{density}, {weighting}"
            )
        if not (0 < sigmas[0] and sigmas[-1] <= 1 and (sigmas.diff() > 0).all()):
            raise ValueError(f"expected noise levels that ascend within (0, 1], got {sigmas[0]:g} to {sigmas[-1]:g}")
        self.sigmas, self.num_terms, self.shift = sigmas, len(sigmas), shift
        self.density, self.weighting = density, weighting

    @property
    def grid(self) -> dict[str, float | str]:
        return {"shift": self.shift} | ({} if self.weighting == "none" else {"weighting": self.weighting})

    def sample_terms(self, count: int, generator: Generator) -> Tensor:
        if self.density == "uniform":
            return super().sample_terms(count, generator)
        places = self.densities[self.density](count, generator)
        return (self.num_terms - 1 - (places * self.num_terms).long()).clamp_min(0)  # the grid begins at pure noise

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        values = super().__call__(model, batch, terms, noise, target)
        return values * self.weights[self.weighting](self.sigmas.to(values)[terms])

    def target(self, batch: Batch, terms: Tensor, noise: Tensor) -> Tensor:
        return noise - batch["sample"]

    def parts(self, predicted: Tensor, noisy: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        signal_scale, noise_scale = self.scales(noisy, terms)
        return noisy - noise_scale * predicted, noisy + signal_scale * predicted

    def times(self, terms: Tensor) -> Tensor:
        return self.num_terms * self.sigmas.to(terms.device)[terms]

    def call(self, model: Callable, noisy: Tensor, times: Tensor, conditions: Batch) -> Tensor:
        return model(hidden_states=noisy, timestep=times, **conditions).sample

    def _scales(self, sample: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """1 - s and s."""
        sigmas = self._at(self.sigmas, sample, terms)
        return 1 - sigmas, sigmas
