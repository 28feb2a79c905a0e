"""Measure what the method's fast paths cost and how far they are from the slow ones.

    python scripts/benchmark.py --only fisher
    python scripts/benchmark.py --only fisher --exact_samples 8 --samples 8 --terms 4,10
    python scripts/benchmark.py --only fisher --model runs/digits8x8_base/pipeline --samples 60 --terms 2
    OMP_NUM_THREADS=1 taskset -c 0 python scripts/benchmark.py --only fisher_linear

fisher: the cheap estimator (per sample two draws of K timesteps) against the paper's (all T timesteps) on other
samples of the same model, with a scale a tensor, one scale, or none. fisher_linear: many samples at a time against one
at a time, on the paper's VAE. Writes benchmark.json and benchmark.md.
"""

import argparse
import time
from pathlib import Path

import torch
from scipy.stats import pearsonr, spearmanr

from sa_diffusers.artifacts import atomic_path, write_json
from sa_diffusers.bundled import resolve
from sa_diffusers.cli import friendly_errors
from sa_diffusers.families import Family, get_family
from sa_diffusers.fisher import FisherSums, estimate_fisher
from sa_diffusers.fisher_linear import estimate_linear_fisher
from sa_diffusers.loading import load_pipeline
from sa_diffusers.losses import VAELoss
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.prompts import read_prompts
from sa_diffusers.replay import sample_requests
from sa_diffusers.sampling import SamplingSettings, draw_samples


LINEAR_ROUNDS = 3


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


def benchmark_fisher(family: Family, args: argparse.Namespace) -> list[dict]:
    """A row an estimator: evaluations, seconds, agreement with the exact Fisher of other samples."""
    count = 2 * args.exact_samples + args.samples
    if family.labels:  # a class-conditional model: its classes are all that it can be asked for
        requests = sample_requests(family.labels, count, 0.0, args.seed)
    else:
        requests = sample_requests(read_prompts(args.prompts), count, 0.1, args.seed)
    samples = draw_samples(family, requests, SamplingSettings(1.5, 12, 60))
    parameters = dict(family.module.requires_grad_(True).eval().named_parameters())

    def estimate(first: int, number: int, terms: int | None) -> tuple[FisherSums, float]:
        start = time.perf_counter()
        sums = estimate_fisher(
            family.module,
            family.loss,
            parameters,
            lambda i: family.batch(samples.latents[i : i + 1], samples.prompts[i : i + 1]),
            range(first, first + number),
            terms=terms,
            seed=args.seed,
        )
        return sums, time.perf_counter() - start

    halves = [estimate(start, args.exact_samples, None) for start in (0, args.exact_samples)]
    first_half, second_half = (flatten(sums.finish({}).tensors) for sums, _ in halves)
    exact = (first_half + second_half) / 2
    seconds = sum(elapsed for _, elapsed in halves) / 2
    evaluations = args.exact_samples * family.loss.num_terms
    rows = [{"estimator": "exact, half against half", "evaluations": evaluations, "seconds": seconds}]
    rows[0] |= compare(first_half, second_half)
    for terms in args.terms:
        sums, seconds = estimate(2 * args.exact_samples, args.samples, terms)
        cheap = sums.finish({})
        unscaled = {name: square / args.samples for name, square in sums.square.items()}
        variants = {
            "a scale a tensor": cheap.tensors,
            "one scale": {name: value * cheap.metadata["scale"] for name, value in unscaled.items()},
            "unscaled": unscaled,
        }
        for name, tensors in variants.items():
            cost = {"estimator": f"2 draws of {terms}, {name}", "evaluations": 2 * terms * args.samples}
            rows.append(cost | {"seconds": seconds} | compare(flatten(tensors), exact))
    return rows


def benchmark_fisher_linear(args: argparse.Namespace) -> list[dict]:
    """A row a way, on a VAE of the paper's size with random weights and its own images; in rounds, taking turns."""
    torch.manual_seed(args.seed)
    model = ConditionalVAE().eval()
    parameters, loss = dict(model.named_parameters()), VAELoss(model.config.latent_dim)
    few, many = args.one_by_one_samples, args.linear_samples
    labels = torch.randint(model.config.num_classes, (max(few, many),))
    with torch.no_grad():
        images = model.decode(torch.randn(len(labels), loss.latent_dim), labels)

    def batch(indices: list[int]) -> dict[str, torch.Tensor]:
        return {"sample": images[indices], "labels": labels[indices]}

    def one_by_one(number: int) -> FisherSums:
        return estimate_fisher(
            model, loss, parameters, lambda i: batch([i]), range(number), terms=None, seed=args.seed
        )

    def together(number: int) -> FisherSums:
        return estimate_linear_fisher(model, loss, batch, range(number), seed=args.seed)

    ways = {"one at a time": (one_by_one, few), "many at a time": (together, many)}
    seconds = dict.fromkeys(ways, 0.0)
    for _ in range(LINEAR_ROUNDS):
        for name, (estimate, number) in ways.items():
            start = time.perf_counter()
            estimate(number)
            seconds[name] += (time.perf_counter() - start) / number / LINEAR_ROUNDS
    first, second = (flatten(estimate(few).square) for estimate, _ in ways.values())
    slow, fast = (
        {"estimator": name, "samples": ways[name][1], "seconds_per_sample": value} for name, value in seconds.items()
    )
    fast["times_faster"] = slow["seconds_per_sample"] / fast["seconds_per_sample"]
    fast["largest_difference"] = float((first - second).abs().max() / first.max())  # as a share of the largest
    return [slow, fast]


def markdown(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    for row in rows:
        cells = [f"{row[k]:.3g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["fisher", "fisher_linear"], default="fisher", help="default: %(default)s")
    parser.add_argument("--model", default="bundled/digits/pipeline", help="default: %(default)s")
    parser.add_argument("--prompts", default="bundled/digits/replay_prompts.txt", help="default: %(default)s")
    parser.add_argument(
        "--exact_samples", type=int, default=24, help="samples of each exact half (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=96, help="samples of the cheap estimator (default: %(default)s)"
    )
    parser.add_argument(
        "--terms", type=lambda text: [int(k) for k in text.split(",")], default=[2, 5, 10], help="K (default: 2,5,10)"
    )
    parser.add_argument("--linear_samples", type=int, default=20_000, help="many at a time (default: %(default)s)")
    parser.add_argument("--one_by_one_samples", type=int, default=500, help="one at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"), help="default: %(default)s")
    args = parser.parse_args()
    with friendly_errors():
        if args.only == "fisher":
            rows = benchmark_fisher(get_family(load_pipeline(resolve(args.model), None, None, "float32")), args)
        else:
            rows = benchmark_fisher_linear(args)
        write_json(rows, args.output_dir / "benchmark.json")
        with atomic_path(args.output_dir / "benchmark.md") as temporary:
            temporary.write_text(markdown(rows))
        print(markdown(rows))


if __name__ == "__main__":
    main()
