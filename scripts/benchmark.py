"""Measure what the method's fast paths cost and how far they are from the slow ones.

    python scripts/benchmark.py --only fisher
    python scripts/benchmark.py --only fisher --exact_samples 8 --samples 8 --terms 4,10

fisher: the cheap estimator (per sample two draws of K timesteps) against the paper's (all T timesteps) on other
samples of the same model, with a scale a tensor, one scale, or none. Writes benchmark.json and benchmark.md.
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
from sa_diffusers.loading import load_pipeline
from sa_diffusers.prompts import read_prompts
from sa_diffusers.replay import sample_requests
from sa_diffusers.sampling import SamplingSettings, draw_samples


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


def markdown(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    for row in rows:
        cells = [f"{row[k]:.3g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["fisher"], default="fisher", help="what to measure (default: %(default)s)")
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
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"), help="default: %(default)s")
    args = parser.parse_args()
    with friendly_errors():
        family = get_family(load_pipeline(resolve(args.model), None, None, "float32"))
        rows = benchmark_fisher(family, args)
        write_json(rows, args.output_dir / "benchmark.json")
        with atomic_path(args.output_dir / "benchmark.md") as temporary:
            temporary.write_text(markdown(rows))
        print(markdown(rows))


if __name__ == "__main__":
    main()
