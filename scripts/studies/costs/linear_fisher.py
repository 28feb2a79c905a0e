"""The Fisher of linear layers: many samples at a time against one at a time, on a VAE of the paper's size."""

import time

import torch

from sa_diffusers.core.fisher import FisherSums, estimate_fisher
from sa_diffusers.core.fisher_linear import estimate_linear_fisher
from sa_diffusers.core.losses import VAELoss
from sa_diffusers.models import ConditionalVAE
from studies.costs.fisher_agreement import flatten


ROUNDS = 3


def compare_linear(few: int, many: int, seed: int) -> list[dict]:
    """A row a way, on random weights and the model's own images; in rounds, taking turns.

    Args:
        few, many: samples one at a time, and many at a time.
    """
    torch.manual_seed(seed)
    model = ConditionalVAE().eval()
    parameters, loss = dict(model.named_parameters()), VAELoss(model.config.latent_dim)
    labels = torch.randint(model.config.num_classes, (max(few, many),))
    with torch.no_grad():
        images = model.decode(torch.randn(len(labels), loss.latent_dim), labels)

    def batch(indices: list[int]) -> dict[str, torch.Tensor]:
        return {"sample": images[indices], "labels": labels[indices]}

    def one_by_one(number: int) -> FisherSums:
        return estimate_fisher(model, loss, parameters, lambda i: batch([i]), range(number), terms=None, seed=seed)

    def together(number: int) -> FisherSums:
        return estimate_linear_fisher(model, loss, batch, range(number), seed=seed)

    ways = {"one at a time": (one_by_one, few), "many at a time": (together, many)}
    seconds = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, (estimate, number) in ways.items():
            start = time.perf_counter()
            estimate(number)
            seconds[name] += (time.perf_counter() - start) / number / ROUNDS
    first, second = (flatten(estimate(few).square) for estimate, _ in ways.values())
    slow, fast = (
        {"estimator": name, "samples": ways[name][1], "seconds_per_sample": value} for name, value in seconds.items()
    )
    fast["times_faster"] = slow["seconds_per_sample"] / fast["seconds_per_sample"]
    fast["largest_difference"] = float((first - second).abs().max() / first.max())  # as a share of the largest
    return [slow, fast]
