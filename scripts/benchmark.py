"""Measure what the method costs, side by side with the authors' way of doing it and with plain fine-tuning.

    OMP_NUM_THREADS=1 python scripts/benchmark.py --size tiny --output_dir runs/benchmark
    python scripts/benchmark.py --size sd14 --output_dir runs/benchmark_sd14
    python scripts/benchmark.py --size sd14 --estimate
    python scripts/benchmark.py --size flux --estimate
    python scripts/benchmark.py --size i2i --estimate
    python scripts/benchmark.py --only fisher
    python scripts/benchmark.py --only fisher --model runs/digits8x8_base/pipeline --samples 60 --terms 2
    python scripts/benchmark.py --only fisher --model bundled/digits_flow/pipeline --terms 10 --exact_terms 200
    OMP_NUM_THREADS=1 taskset -c 0 python scripts/benchmark.py --only fisher_linear

--size: seconds and peak memory of sampling, Fisher and a training step in each way, taking turns in one process, and
whole runs extrapolated from them. tiny is the bundled pipeline and configs/digits.yaml, for a CPU; sd14 the
architecture of Stable Diffusion 1.4 with random weights and configs/default.yaml, for a GPU. With --estimate nothing
runs: operations and bytes are counted, and times follow from stated rates; that alone there is of sd3, flux and i2i,
the models that complete pictures of configs/paper/i2i_*.yaml. sdxl alone is one whole run of the fewest steps, of
random weights at 32 pixels, on the CPU: 20 GB of main memory.

--only fisher: the cheap estimator (per sample two draws of K timesteps) against the paper's (all T timesteps) on other
samples of the same model, with a scale a tensor, one scale, or none. --only fisher_linear: many samples at a time
against one at a time, on the paper's VAE.

Writes benchmark.json and benchmark.md.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.families import get_family
from sa_diffusers.io.atomic_files import write_json, write_text
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.models.precision import compute_dtype
from sa_diffusers.runs.options import ForgetConfig
from studies.costs.architectures import DENOISERS, build_stable_diffusion
from studies.costs.completion import estimate_completion
from studies.costs.estimate import estimate_report
from studies.costs.fisher_agreement import compare_estimators
from studies.costs.large import estimate_large
from studies.costs.linear_fisher import compare_linear
from studies.costs.measured import WORKLOADS, measured_report
from studies.costs.whole_run import run_whole
from studies.rows import table_of


CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {"tiny": "digits.yaml", "sd14": "default.yaml"}
COUNTED = {name: partial(estimate_large, name) for name in DENOISERS}
COUNTED |= {"sd14": estimate_report, "i2i": estimate_completion}


def read_config(name: str) -> ForgetConfig:
    return parse_config(ForgetConfig, ["--config", str(CONFIGS / name)]).resolved()


def run_sizes(args: argparse.Namespace) -> tuple[dict | list[dict], str]:
    """The report of --size: for JSON, and as Markdown."""
    if args.estimate:
        if args.size == "tiny":
            raise ValueError(
                "--estimate counts large models: expected another --size than tiny, which can be measured"
            )
        return COUNTED[args.size]()
    if args.size == "sdxl":
        return run_whole(args.output_dir, args.seed)
    if args.size not in SIZES:
        raise ValueError(f"--size {args.size} is counted, not measured; pass --estimate")
    config = read_config(SIZES[args.size])
    if args.size == "tiny":
        pipeline = load_pipeline(config.model, None, None, "float32")
    elif torch.cuda.is_available():
        pipeline = build_stable_diffusion("cuda", args.seed)
        torch.set_float32_matmul_precision("high")  # TF32, the default of the PyTorch that the authors used
    else:
        raise ValueError("--size sd14 needs a GPU, and there is none; --estimate counts what it would cost")
    given = {name: getattr(args, name) for name in ("images", "images_one_by_one", "timesteps", "cheap_samples")}
    load = replace(WORKLOADS[args.size], **{name: value for name, value in given.items() if value is not None})
    precision = args.mixed_precision or ("bf16" if args.size == "sd14" else "no")
    jobs = {"default of Stable Diffusion (configs/default.yaml)": read_config("default.yaml")}
    if args.size == "tiny":
        jobs["configs/digits.yaml"] = config
    prompts = read_prompts(config.replay_prompts)
    dtype = compute_dtype(precision)
    return measured_report(pipeline, prompts, config, jobs, load, args.rounds, args.training_rounds, dtype)


def run_only(args: argparse.Namespace) -> list[dict]:
    if args.only == "fisher_linear":
        return compare_linear(args.one_by_one_samples, args.linear_samples, args.seed)
    family = get_family(load_pipeline(resolve(args.model), None, None, "float32"))
    return compare_estimators(
        family,
        args.prompts,
        args.exact_samples,
        args.samples,
        args.terms,
        args.seed,
        args.draws,
        args.exact_terms,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, default: object, text: str, **options: object) -> None:
        parser.add_argument(flag, default=default, help=f"{text} (default: %(default)s)", **options)

    add("--size", "tiny", "what to measure", choices=[*SIZES, *DENOISERS, "i2i"])
    parser.add_argument("--estimate", action="store_true", help="count costs in place of measuring them; not of tiny")
    add("--only", None, "compare Fishers, in place of --size", choices=["fisher", "fisher_linear"])
    add("--output_dir", Path("runs/benchmark"), "folder of the two files", type=Path)
    add("--seed", 0, "seed of random weights, samples and noise", type=int)
    size = "of --size, in one turn; None: by size"
    add("--rounds", 3, "turns of sampling and Fisher", type=int)
    add("--training_rounds", 20, "turns of training steps", type=int)
    add("--images", None, f"pictures in our way {size}", type=int)
    add("--images_one_by_one", None, f"pictures in the authors' way {size}", type=int)
    add("--timesteps", None, f"timesteps of the exact Fisher {size}", type=int)
    add("--cheap_samples", None, f"samples of the cheap Fisher {size}", type=int)
    add("--mixed_precision", None, "of our ways; None: bf16 for sd14, else no", choices=["no", "fp16", "bf16"])
    add("--model", "bundled/digits/pipeline", "of --only fisher")
    add("--prompts", "bundled/digits/replay_prompts.txt", "of --only fisher")
    add("--exact_samples", 24, "samples of each exact half", type=int)
    add("--exact_terms", None, "of two draws in place of all timesteps, for the exact halves", type=int)
    add("--samples", 96, "samples of the cheap estimator", type=int)
    add("--draws", 1, "times that it is estimated, from other samples each time", type=int)
    add("--terms", [2, 5, 10], "K", type=lambda text: [int(k) for k in text.split(",")])
    add("--linear_samples", 20_000, "samples many at a time", type=int)
    add("--one_by_one_samples", 500, "samples one at a time", type=int)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with friendly_errors():
        if args.only:
            rows = run_only(args)
            text = table_of(rows)
        else:
            rows, text = run_sizes(args)
        write_json(rows, args.output_dir / "benchmark.json")
        write_text(text, args.output_dir / "benchmark.md")
        print(text)


if __name__ == "__main__":
    main()
