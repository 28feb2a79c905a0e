"""The loss of a denoiser that is also shown a mask, and what the mask leaves of the picture."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sa_diffusers.core.batches import Batch, conditions_of
from sa_diffusers.core.conditions import degraded
from sa_diffusers.core.losses.denoising import DiffusionLoss


OWN = ("hidden", "kinds", "context", "terms", "noise")  # of a batch, what the model is not told by these names


class FillingLoss(DiffusionLoss):
    """`DiffusionLoss` of latents z(x), with the model called as `model([noisy, mask, z(visible)], timesteps, ...)`.

    A batch holds "sample" x, whole pictures [B, C, H, W] in [-1, 1], and "hidden", the pixels that the mask hides
    [B, 1, H, W], of the same kind in each cell of the latents; visible is x with 0 in their place, or as `degraded` by
    "kinds", or that of "context", other pictures. What was drawn for it, "terms" and "noise", may stand in it too.

    Args:
        encode: pictures to latents, without a gradient.
        latent_shape: of one picture.
        others: of `DiffusionLoss`.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str,
        encode: Callable[[Tensor], Tensor],
        latent_shape: tuple[int, int, int],
    ):
        super().__init__(alphas_cumprod, prediction_type)
        self.encode, self.latent_shape = encode, latent_shape

    def sample_noise(self, batch: Batch, generator: Generator) -> Tensor:
        sample = batch["sample"]
        return torch.randn(len(sample), *self.latent_shape, generator=generator, dtype=sample.dtype).to(sample.device)

    def __call__(
        self, model: Callable, batch: Batch, terms: Tensor, noise: Tensor, target: Tensor | None = None
    ) -> Tensor:
        return super().__call__(model, self.encoded(batch), terms, noise, target)

    def encoded(self, batch: Batch) -> Batch:
        """The batch in latents, with "shown", [B, 1 + C, h, w], in the place of the mask."""
        sample, hidden = batch["sample"], batch["hidden"]
        rest = {name: part for name, part in conditions_of(batch).items() if name not in OWN}
        kinds = batch["kinds"] if "kinds" in batch else torch.zeros(len(sample), dtype=torch.long)
        mask = F.interpolate(hidden.to(sample), self.latent_shape[1:], mode="nearest")
        seen = degraded(batch.get("context", sample), hidden, kinds.to(sample.device))
        shown = torch.cat([mask, self.encode(seen)], 1)
        return rest | {"sample": self.encode(sample), "shown": shown}

    def call(self, model: Callable, noisy: Tensor, times: Tensor, conditions: Batch) -> Tensor:
        rest = {name: part for name, part in conditions.items() if name != "shown"}
        return super().call(model, torch.cat([noisy, conditions["shown"]], 1), times, rest)

    def look(self, model: Callable, batch: Batch) -> None:
        """Call the model as training does, with the "terms" and "noise" of the batch; without, at pure noise."""
        if "noise" in batch:
            self.outputs(model, batch)
        else:
            data = self.encoded(batch)
            noise = self.sample_noise(batch, Generator().manual_seed(0))
            last = torch.full((len(noise),), self.num_terms - 1, device=noise.device)
            self.call(model, noise, self.times(last), conditions_of(data))

    def outputs(self, model: Callable, batch: Batch) -> Tensor:
        """What the model predicts [B, C, h, w] with the "terms" and "noise" of the batch."""
        return self.predict(model, self.encoded(batch), batch["terms"], batch["noise"])

    def towards(self, batch: Batch, others: Tensor) -> tuple[Batch, None]:
        """As of `PatchLoss`: the holes of what is noisy are those of other pictures, and the context stays."""
        sample = batch["sample"]
        return {**batch, "sample": torch.where(batch["hidden"], others, sample), "context": sample}, None
