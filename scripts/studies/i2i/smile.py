"""How much of the truth a fill tells: the SMILE estimate of mutual information (Song & Ermon, ICLR 2020)."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_diffusers.core.seeding import derive_seed, seeded


CLIPS = (1.0, 5.0)  # tau
STEPS, BATCH, LEARNING_RATE, LOOKED_AT = 240, 256, 1e-3, 20


class Critic(nn.Module):
    """T(a, b) of all pairs [N, N] of rows of a and b [N, D]."""

    def __init__(self, sizes: tuple[int, int], width: int = 128, rank: int = 32):
        super().__init__()
        self.sides = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, rank)) for size in sizes
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = (side(rows) for side, rows in zip(self.sides, (a, b), strict=True))
        return left @ right.T / left.shape[1] ** 0.5


def estimate(scores: Tensor, tau: float) -> float:
    """E_P[T] - log E_Q[clip(exp T, e^-tau, e^tau)] in nats, of scores [N, N], P on the diagonal (Eq. 10)."""
    scores = scores.double()
    return (scores.diagonal().mean() - _others(scores).clamp(-tau, tau).exp().mean().log()).item()


def smile(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    """The estimate of held-out pairs for every tau; the critic is fitted to others, until a fifth of these says stop.

    Args:
        train, test: pairs of rows [N, D].
    """
    order = torch.randperm(len(train[0]), generator=seeded(seed, "critic"))
    fit, held = order[: -len(order) // 5], order[-len(order) // 5 :]
    torch.manual_seed(derive_seed(seed, "critic"))
    critic = Critic((train[0].shape[1], train[1].shape[1]))
    optimiser = torch.optim.AdamW(critic.parameters(), LEARNING_RATE, weight_decay=0.01)
    best, kept = float("-inf"), critic
    for step in range(STEPS):
        if step % LOOKED_AT == 0:
            with torch.no_grad():
                found = estimate(critic(*(side[held] for side in train)), CLIPS[-1])
            if found > best:
                best, kept = found, copy.deepcopy(critic)
        rows = fit[torch.randint(len(fit), (min(BATCH, len(fit)),), generator=seeded(seed, "critic", step)).unique()]
        scores = critic(*(side[rows] for side in train))
        optimiser.zero_grad()
        (F.softplus(-scores.diagonal()).mean() + F.softplus(_others(scores)).mean()).backward()
        optimiser.step()
    with torch.no_grad():
        scores = kept(*test)
    return {f"tau {tau:g}": estimate(scores, tau) for tau in CLIPS}


def _others(scores: Tensor) -> Tensor:
    return scores[~torch.eye(len(scores), dtype=torch.bool)]
