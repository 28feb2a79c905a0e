"""Attacks without a gradient: latents and conditions that training never paired, and walks between two of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_diffusers.core.seeding import seeded
from studies.mnist.attacks.attempt import Attempt, Decoder, one_hot


def random_latents(
    decode: Decoder, label: int, count: int, condition_scale: float, seed: int, *, latent_dim: int, num_classes: int
) -> Attempt:
    """Ask for a class from z ~ N(0, I), with a condition of another strength: c = condition_scale * one-hot(label).

    Training shows a decoder one-hot conditions only, so a scale of 1 is plain sampling, and a small one (0.1) asks
    weakly enough that what was done to the class's own weights may count for little.

    Args:
        count: images; image i depends on (seed, i) alone, so that models and counts can be compared.
    """
    latents = torch.stack([torch.randn(latent_dim, generator=seeded(seed, "random latents", i)) for i in range(count)])
    conditions = condition_scale * one_hot(torch.full((count,), label), num_classes)
    return _attempt(decode, latents, conditions)


def posterior_sample(mean: Tensor, log_variance: Tensor, seed: int) -> Tensor:
    """z ~ N(mean, exp(log_variance)) [B, L], from an encoder's result, two of [B, L]; row i depends on (seed, i)."""
    noise = torch.stack([torch.randn(mean.shape[1], generator=seeded(seed, "posterior", i)) for i in range(len(mean))])
    return (mean + (log_variance / 2).exp() * noise.to(mean)).detach()


def noisy_condition(
    decode: Decoder,
    latents: Tensor,
    labels: Tensor,
    seed: int,
    *,
    num_classes: int,
    latent_noise: float = 0.1,
    condition_noise: float = 0.1,
    softmax: bool = True,
) -> Attempt:
    """Jostle both inputs: z + latent_noise * N(0, I), and c = softmax(one-hot + condition_noise * U[0, 1]).

    Note that softmax flattens: of ten classes the one asked for is left with a weight of about 0.23 and every other
    gets about 0.09. Without it, c stays near the one-hot row.

    Args:
        latents: z [B, L], such as `posterior_sample` of real images of the class.
        labels: class indices [B].
        softmax: False takes the noisy one-hot row as it is.
    """
    conditions = one_hot(labels, num_classes).to(latents.device)
    generators = [seeded(seed, "noisy condition", i) for i in range(len(latents))]
    normal = torch.stack([torch.randn(latents.shape[1], generator=g) for g in generators])
    uniform = torch.stack([torch.rand(num_classes, generator=g) for g in generators])
    conditions = conditions + condition_noise * uniform.to(conditions)
    return _attempt(
        decode, latents + latent_noise * normal.to(latents), conditions.softmax(1) if softmax else conditions
    )


def interpolate(
    decode: Decoder, latents: Sequence[Tensor], conditions: Sequence[Tensor], steps_per_leg: int = 12
) -> Attempt:
    """Walk in straight lines through key points (z, c), to see whether a way leads through the forgotten class.

    Equal conditions keep c fixed and walk z alone, equal latents the other way round; three keys give two legs that
    share the middle, 2 * steps_per_leg - 1 images in all. The keys themselves are on the path, to the last bit.

    Args:
        latents: z [L] of each key, at least two.
        conditions: weights [K] of each key.
        steps_per_leg: points of a leg, both of its ends counted.
    """
    return _attempt(decode, _path(latents, steps_per_leg), _path(conditions, steps_per_leg))


def _path(keys: Sequence[Tensor], steps: int) -> Tensor:
    """[1 + legs * (steps - 1), D]; a leg leaves its first point to the leg before."""
    fractions = torch.linspace(0, 1, steps, device=keys[0].device)[1:, None]
    # lerp, unlike a + t (b - a), ends on b exactly.
    legs = [torch.lerp(a[None], b[None], fractions.to(a)) for a, b in zip(keys, keys[1:], strict=False)]
    return torch.cat([keys[0][None], *legs])


@torch.no_grad()
def _attempt(decode: Decoder, latents: Tensor, conditions: Tensor) -> Attempt:
    return Attempt(decode(latents, conditions), latents.detach(), conditions.detach())
