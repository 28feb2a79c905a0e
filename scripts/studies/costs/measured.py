"""One run that measures every stage in every way, and extrapolates whole runs from it."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from sa_diffusers.families import get_family
from sa_diffusers.runs.options import ForgetConfig
from studies.costs import stages
from studies.costs.authors import BATCH_SIZE, NUM_STEPS
from studies.costs.estimate import AUTHORS, extrapolate, job_of, measured_costs
from studies.costs.timing import measure
from studies.rows import duration, table_of


# A change to them changes how steady the figures are, not what they mean.
WORKLOADS = {
    "tiny": stages.Workload(images=60, images_one_by_one=3, timesteps=200, cheap_samples=12, steps=2),
    "sd14": stages.Workload(images=16, images_one_by_one=2, timesteps=200, cheap_samples=10, steps=4),
}


def measure_stages(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    config: ForgetConfig,
    load: stages.Workload,
    rounds: int,
    training_rounds: int,
    dtype: torch.dtype | None,
) -> list[dict[str, Any]]:
    """Rows of `timing.measure` for sampling, Fisher and training step.

    Args:
        pipeline: on the device to measure; its UNet is trained by steps of almost nothing.
        rounds, training_rounds: turns of every way; a training step takes little, and EWC's share of it is small.
        dtype: that our own ways autocast to; None: none. Of the authors', only sampling does, to float16.
    """
    ours = get_family(pipeline, sampler=config.sampler, compute_dtype=dtype)
    authors = get_family(pipeline, sampler="ddim", compute_dtype=None if dtype is None else torch.float16)
    device = ours.device
    rows = measure(stages.sampling_ways(ours, authors, prompts, config, load), rounds, device)
    rows += measure(stages.fisher_ways(ours, prompts, config, load), rounds, device)
    return rows + measure(stages.training_ways(ours, prompts, config, load), training_rounds, device)


def extrapolate_runs(rows: list[dict[str, Any]], config: ForgetConfig, jobs: dict[str, ForgetConfig]) -> list[dict]:
    """Whole runs at the measured speeds: the authors' settings in their way and in ours, and `jobs` in ours.

    Args:
        config: that was measured.
        jobs: configurations by what to call them.
    """
    steps, samples = config.num_inference_steps, 2 * config.train_batch_size
    theirs = measured_costs(rows, ("authors", NUM_STEPS), "authors", ("authors", 2 * BATCH_SIZE))
    exact = measured_costs(rows, ("ours", steps), stages.EXACT, (stages.EWC, samples))
    runs = [("authors", AUTHORS, theirs), ("ours", AUTHORS, exact)]
    for name, job in jobs.items():
        step = stages.FROZEN if job.replay_target == "model" else stages.EWC
        costs = measured_costs(rows, ("ours", steps), stages.cheap_name(config), (step, samples))
        runs.append(("ours", job_of(job, name), costs))
    total = extrapolate(AUTHORS, theirs)["total"]
    result = []
    for way, job, costs in runs:
        seconds = extrapolate(job, costs)
        result.append({"run": job.name, "way": way, "seconds": seconds, "times_faster": total / seconds["total"]})
    return result


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def stages_table(rows: list[dict[str, Any]]) -> str:
    """The stages as Markdown."""
    cells = [
        {
            "stage": row["stage"],
            "way": row["way"],
            "unit": row["unit"],
            "seconds a unit": row["seconds"],
            "times faster": f"{row['times_faster']:.2f}",
            "than": row["than"] if row["than"] != row["way"] else "",
            "more time": f"{1 / row['times_faster'] - 1:+.1%}"
            if row["than"] in (stages.WITHOUT_EWC, stages.EWC)
            else "",
            "peak memory, MB": f"{row['peak_bytes'] / 1e6:,.1f}",
        }
        for row in rows
    ]
    return table_of(cells)


def runs_table(runs: list[dict[str, Any]]) -> str:
    """Whole runs as Markdown."""
    cells = [
        {"run": run["run"], "way": run["way"]}
        | {stage: duration(value) for stage, value in run["seconds"].items() if stage != "evaluation"}
        | {"times faster": run["times_faster"]}
        for run in runs
    ]
    return table_of(cells)


def measured_report(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    config: ForgetConfig,
    jobs: dict[str, ForgetConfig],
    load: stages.Workload,
    rounds: int,
    training_rounds: int,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Any], str]:
    """Everything, for JSON, and as Markdown; arguments as of `measure_stages` and `extrapolate_runs`."""
    device = pipeline.unet.device
    rows = measure_stages(pipeline, prompts, config, load, rounds, training_rounds, dtype)
    runs = extrapolate_runs(rows, config, jobs)
    precision = (
        "float32"
        if dtype is None
        else f"{str(dtype).removeprefix('torch.')} autocast (the authors': sampling float16, else float32)"
    )
    where = f"{describe_device(device)}, {precision}"
    memory = (
        "what the allocator gave out"
        if device.type == "cuda"
        else "tensors alone, those a way holds and the most that one turn makes beside them; on a CPU that is also "
        "what the authors keep in main memory"
    )
    parts = (
        f"Measured on {where}. Ways take turns: medians of {rounds} ({training_rounds} for training steps). A step of "
        f"training is of {config.train_batch_size} + {config.train_batch_size} samples, the authors' of "
        f"{BATCH_SIZE} + {BATCH_SIZE}; plain fine-tuning is on as many samples in all, without replay or EWC. "
        f"Peak memory: {memory}.\n",
        stages_table(rows),
        "Extrapolated to whole runs on one such device from the speeds above, not run; without evaluation. Training "
        "is taken as proportional to the samples in a step.\n",
        runs_table(runs),
    )
    report = {"device": where, "workload": asdict(load), "rounds": [rounds, training_rounds]}
    return report | {"stages": rows, "whole_runs": runs}, "\n".join(parts)
