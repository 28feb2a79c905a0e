"""The authors' way of doing each stage, for comparison: pictures one by one, timesteps one by one, EWC by autograd.

Where their code does more than is needed for the comparison, it is left out in their favour: watermarks, and encoding
pictures and captions anew in every step. For the Fisher they add up 50 losses, each of a forward pass of its own,
before they go backward, and recompute activations; here every timestep goes backward at once: the same gradient in
less memory, and nothing is computed twice.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.losses import Loss
from sa_diffusers.core.objectives import SelectiveAmnesia
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.sampling import Request
from sa_diffusers.families import Family


NUM_STEPS, GUIDANCE_SCALE = 50, 7.5  # of their DDIM sampler (eta 0)
BATCH_SIZE = 4  # of theirs in training, on each of 4 GPUs: as many surrogate and as many replay samples


def draw_one_by_one(
    family: Family, requests: Sequence[Request], num_steps: int = NUM_STEPS, guidance_scale: float = GUIDANCE_SCALE
) -> Tensor:
    """One picture at a time through a PNG, encoded again for training: latents [N, C, h, w].

    Args:
        family: made with sampler "ddim".
    """
    latents = []
    for request in requests:
        drawn = family.draw([request.condition], [request.seed], guidance_scale, num_steps, [request.negative])
        levels = ((family.decode(drawn)[0] + 1) * 127.5).round().byte()
        file = io.BytesIO()
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(file, "png")
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        latents.append(family.encode(pixels[None] / 127.5 - 1, seeded(request.seed, "encode")))
    return torch.cat(latents)


def add_squared_gradient(
    model: nn.Module,
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    noise: Tensor,
    sums: dict[str, Tensor],
) -> None:
    """Add one sample's (sum_t g_t)^2 to `sums`, which lie in main memory; one timestep a forward pass.

    Args:
        batch: of one sample, on the model's device.
        noise: of each timestep, [T, ...].
        sums: by parameter name; continued in place.
    """
    for parameter in parameters.values():
        parameter.grad = None
    for term in range(len(noise)):
        terms = torch.tensor([term], device=noise.device)
        loss(model, batch, terms, noise[term : term + 1]).sum().backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            sums[name] += parameter.grad.cpu().square()
            parameter.grad = None


class AutogradEWC:
    """ewc_lambda * sum F (theta - anchor)^2 as a part of the loss, so that its gradient comes through autograd.

    Args:
        parameters: the trained ones by name; the anchor is a copy of their values now.
        fisher: by the same names.
        device: where Fisher and anchor are kept; each is brought to its parameter in every step. The authors: "cpu".
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        fisher: Mapping[str, Tensor],
        ewc_lambda: float,
        device: torch.device | str,
    ):
        self.parameters, self.ewc_lambda = list(parameters.values()), ewc_lambda
        self.fisher = [fisher[name].to(device) for name in parameters]
        self.anchor = [parameter.detach().to(device, copy=True) for parameter in parameters.values()]

    def __call__(self) -> Tensor:
        total = torch.zeros((), device=self.parameters[0].device)
        for parameter, fisher, anchor in zip(self.parameters, self.fisher, self.anchor, strict=True):
            device = parameter.device
            total = total + (fisher.to(device) * (parameter - anchor.to(device)).square()).sum()
        return self.ewc_lambda * total


class AutogradSelectiveAmnesia(SelectiveAmnesia):
    """Selective Amnesia whose EWC is a part of the loss.

    Args:
        penalty: the EWC term.
        one_pass: surrogate and replay in one forward pass as ours, or in one each, as the authors.
    """

    def __init__(self, loss: Loss, penalty: AutogradEWC, one_pass: bool):
        super().__init__(loss, ewc=None)
        self.penalty, self.one_pass = penalty, one_pass

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.one_pass:
            means = self.mean_losses(model, batch)
        else:
            means = {}
            for name, part in batch.items():
                means |= self.mean_losses(model, {name: part})
        total = sum(means.values()) + self.penalty()
        return total, {name: mean.detach() for name, mean in means.items()}
