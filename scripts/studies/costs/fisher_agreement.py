"""How far the cheap Fisher is from the paper's, on other samples of the same model, and what both cost."""

import time
from collections.abc import Sequence
from itertools import product

import torch
from scipy.stats import pearsonr, spearmanr

from sa_diffusers.core.fisher import FisherSums, estimate_fisher
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.data.replay import sample_requests
from sa_diffusers.data.sampling import SamplingSettings, draw_samples
from sa_diffusers.families import Family


def compare(estimate: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How two Fishers agree over all weights, flattened."""
    positive = (estimate > 0) & (exact > 0)
    return {
        "pearson": float(pearsonr(estimate, exact).statistic),
        "pearson_log": float(pearsonr(estimate[positive].log(), exact[positive].log()).statistic),
        "spearman": float(spearmanr(estimate, exact).statistic),
        "total_ratio": float(estimate.sum() / exact.sum()),
        "median_ratio": float((estimate[positive] / exact[positive]).median()),
        "zero_where_exact_is_not": float(((estimate == 0) & (exact > 0)).double().mean()),
    }


def flatten(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(tensors.items())])


def compare_estimators(
    family: Family,
    prompts: str,
    exact_samples: int,
    num_samples: int,
    terms: Sequence[int],
    seed: int,
    draws: int = 1,
    exact_terms: int | None = None,
) -> list[dict]:
    """A row an estimator: evaluations, seconds, agreement with the exact Fisher of other samples.

    Args:
        prompts: a file of them; not used by a model that has classes.
        exact_samples: of each of the two halves of the exact Fisher.
        num_samples: of the cheap estimator.
        terms: K, timesteps in each of its two draws.
        draws: times that it is estimated, each from samples of its own.
        exact_terms: in each of two draws of what stands for the exact Fisher, on a long grid; None: all of them.
    """
    count = 2 * exact_samples + draws * num_samples
    # A class-conditional model's classes are all that it can be asked for.
    requests = sample_requests(family.labels or read_prompts(prompts), count, 0.0 if family.labels else 0.1, seed)
    samples = draw_samples(family, requests, SamplingSettings(1.5, 12, 60))
    parameters = dict(family.module.requires_grad_(True).eval().named_parameters())

    def estimate(first: int, number: int, terms: int | None) -> tuple[FisherSums, float]:
        start = time.perf_counter()
        sums = estimate_fisher(
            family.module,
            family.loss,
            parameters,
            lambda i: family.batch(samples.latents[i : i + 1], samples.conditions[i : i + 1]),
            range(first, first + number),
            terms=terms,
            seed=seed,
        )
        return sums, time.perf_counter() - start

    halves = [estimate(start, exact_samples, exact_terms) for start in (0, exact_samples)]
    first_half, second_half = (flatten(sums.finish({}).tensors) for sums, _ in halves)
    exact = (first_half + second_half) / 2
    seconds = sum(elapsed for _, elapsed in halves) / 2
    evaluations = exact_samples * (2 * exact_terms if exact_terms else family.loss.num_terms)
    name = f"2 draws of {exact_terms}" if exact_terms else "exact"
    rows = [{"estimator": f"{name}, half against half", "evaluations": evaluations, "seconds": seconds}]
    rows[0] |= compare(first_half, second_half)
    for number, draw in product(terms, range(draws)):
        sums, seconds = estimate(2 * exact_samples + draw * num_samples, num_samples, number)
        cheap = sums.finish({})
        unscaled = {name: square / num_samples for name, square in sums.square.items()}
        variants = {
            "a scale a tensor": cheap.tensors,
            "one scale": {name: value * cheap.metadata["scale"] for name, value in unscaled.items()},
            "unscaled": unscaled,
        }
        for name, tensors in variants.items():
            cost = {"estimator": f"2 draws of {number}, {name}", "evaluations": 2 * number * num_samples}
            rows.append(cost | {"seconds": seconds} | compare(flatten(tensors), exact))
    return rows
