"""What Stable Diffusion 1.4 costs on a GPU that is not at hand: counted operations and bytes, at stated rates.

The rate is an assumption, so here is what it stands on. MosaicML's README (github.com/mosaicml/diffusion) reports 290
images a second for training Stable Diffusion 2's UNet at 512 pixels on 8 A100s. At three forward passes a step, as
counted here, that is 87 TFLOP/s an A100, 28 % of its dense bf16 peak of 312. An H200's peak is 989 TFLOP/s, 3.2 times
as much, its memory 2.4 times as fast (4.8 against 2.0 TB/s); were all of the work bound by memory, the same code would
come to 209 TFLOP/s, 21 % of the peak. So 20 % is taken, with 28 % as if it were bound by arithmetic alone, and 12 %.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from studies.costs.architectures import build_unet, build_vae
from studies.costs.counting import decoding_flops, forward_flops
from studies.costs.memory import (
    FISHER_TIMESTEPS,
    SAMPLED_AT_ONCE,
    estimate_memory,
    estimate_stage_memory,
    on_meta,
)
from studies.costs.whole_run import AUTHORS, FROM_NOTHING, SHARED, Costs, Job, extrapolate
from studies.tables import duration, table_of


PEAK = 989e12  # dense bf16 operations a second of an H200
BANDWIDTH = 3.4e12  # bytes a second: 70 % of the 4.8 TB/s of its memory
SHARES = (0.28, 0.20, 0.12)  # of the peak that are sustained
WEIGHTS = 4 * 859_520_964  # bytes of the UNet in float32
AUTHORS_HOURS = 500  # GPU hours of the authors' code for one concept on an A6000 (arXiv 2410.05664, Table 3)
BACKWARD = 2  # a backward pass costs two forward passes
FISHER_PASSES = 32  # reads and writes of a float32 number a weight when a sample's two draws are squared and added up
STEP_PASSES = 32  # the same for clipping, AdamW, EWC's gradient and the casts of weights to bf16
EWC_PASSES = 7  # of these for EWC's gradient: 3 for the weights' change, 4 to add its product with the Fisher
CAST_PASSES = 1.5  # the same for the casts alone, of a forward pass that draws
PIPELINE = 4 * (859_520_964 + 123_060_480 + 83_653_863)  # bytes of UNet, text encoder and VAE in float32
DISK = 2e9  # bytes a second, read or written
HASHING = 0.87e9  # bytes a second: blake2b on one core, as measured on a CPU
CHECKPOINTS = 2  # of weights and Adam, with --checkpointing_steps 500
FISHER_FILES = 11  # the sums are saved ten times on the way, and the Fisher at the end


@lru_cache
def operations() -> tuple[int, int]:
    """Floating point operations of a UNet pass of one sample at 512 pixels, and of decoding it."""
    return forward_flops(on_meta(build_unet)), decoding_flops(on_meta(build_vae))


def estimate_costs(rate: float) -> Costs:
    """Seconds of a unit on a GPU that sustains `rate` operations a second, for steps of 4 + 4 samples.

    A training step's replay half also needs a forward pass of the frozen model; activations are kept. What touches
    every weight without much arithmetic is charged at the memory's bandwidth.
    """
    forward, decoding = (count / rate for count in operations())
    per_sample = 1 + BACKWARD + 0.5
    return Costs(
        image_step=2 * forward + CAST_PASSES * WEIGHTS / BANDWIDTH / SAMPLED_AT_ONCE,
        fisher_evaluation=(1 + BACKWARD) * forward + FISHER_PASSES * WEIGHTS / BANDWIDTH / FISHER_TIMESTEPS,
        training_sample=per_sample * forward + STEP_PASSES * WEIGHTS / BANDWIDTH / FROM_NOTHING.samples_per_step,
        decoded_image=decoding,
    )


def file_seconds(job: Job) -> float:
    """Reading, writing and hashing weights: the pipeline twice, checkpoints, the Fisher; hashes before and after."""
    fisher = WEIGHTS * (FISHER_FILES if job.fisher_evaluations else 1)
    return (2 * PIPELINE + CHECKPOINTS * 3 * WEIGHTS + fisher) / DISK + 2 * PIPELINE / HASHING


def job_seconds(job: Job, share: float) -> dict[str, float]:
    """Seconds of each stage of a job at a share of an H200's peak, of the files, and their total."""
    stages = extrapolate(job, estimate_costs(share * PEAK))
    total = stages.pop("total") + file_seconds(job)
    return stages | {"files": file_seconds(job), "total": total}


def estimate_times(jobs: Sequence[Job] = (FROM_NOTHING, SHARED)) -> list[dict[str, Any]]:
    """One row a job and a share of an H200's peak: how long each stage takes."""
    rows = []
    for job in jobs:
        for share in SHARES:
            seconds = job_seconds(job, share)
            row = {"job": job.name, "share of peak": f"{share:.0%}", "TFLOP/s": round(share * PEAK / 1e12)}
            rows.append(
                row | {stage: duration(value) for stage, value in seconds.items()} | {"seconds": seconds["total"]}
            )
    return rows


def share_needed(job: Job, seconds: float) -> float:
    """The share of an H200's peak at which a job takes that long; time is one part over the rate and one beside it."""
    at_peak, at_half = (job_seconds(job, share)["total"] for share in (1, 0.5))
    over_rate = at_half - at_peak
    return over_rate / (seconds - (at_peak - over_rate))


def authors_operations() -> dict[str, float]:
    """Operations of the authors' settings for one concept, and the rate that their published GPU hours come to.

    Their UNet recomputes activations, so that an evaluation is four forward passes.
    """
    forward, _ = operations()
    passes = (2 + BACKWARD) * (AUTHORS.fisher_evaluations + AUTHORS.train_steps * AUTHORS.samples_per_step)
    total = forward * (passes + 2 * AUTHORS.images * AUTHORS.sampler_steps)
    return {"operations": total, "published_hours": AUTHORS_HOURS, "rate": total / (AUTHORS_HOURS * 3600)}


def estimate_ewc(batch_sizes: Sequence[int] = (8, 16)) -> list[dict[str, Any]]:
    """One row a batch size (surrogate and replay samples together): what EWC adds to a step of plain fine-tuning.

    That has no frozen model: it denoises towards the noise.
    """
    rows = []
    for batch_size in batch_sizes:
        row: dict[str, Any] = {"samples": batch_size}
        for share in SHARES:
            passes = (1 + BACKWARD) * batch_size * operations()[0] / (share * PEAK)
            plain = passes + (STEP_PASSES - EWC_PASSES) * WEIGHTS / BANDWIDTH
            row[f"{share:.0%} of peak"] = EWC_PASSES * WEIGHTS / BANDWIDTH / plain
        rows.append(row)
    return rows


def _limits() -> str:
    return " ".join(
        f"With {job.name}, {minutes} minutes take {share_needed(job, 60 * minutes):.1%}."
        for job, minutes in ((FROM_NOTHING, 30), (SHARED, 6))
    )


def estimate_report() -> tuple[dict[str, Any], str]:
    """Everything, for JSON, and as Markdown."""
    times, authors, memory = estimate_times(), authors_operations(), estimate_memory()
    stage_memory, ewc_share = estimate_stage_memory(), estimate_ewc()
    shown = [{key: value for key, value in row.items() if key != "seconds"} for row in times]
    parts = (
        "Stable Diffusion 1.4 on one H200, estimated from counted operations: not measured. A UNet pass of one sample "
        f"at 512 pixels is {operations()[0] / 1e9:.0f} GFLOP. Rates are shares of the dense bf16 "
        f"peak of {PEAK / 1e12:.0f} TFLOP/s. Published training on A100s sustains 28 % of theirs; 20 % is about what "
        f"the H200's memory, 2.4 times as fast, would make of that. Files are read and written at "
        f"{DISK / 1e9:.0f} GB/s, with {CHECKPOINTS} checkpoints. {_limits()}\n",
        table_of(shown),
        f"The authors' settings are {authors['operations']:.3g} operations, for which {AUTHORS_HOURS} GPU hours on an "
        f"A6000 were published: {authors['rate'] / 1e12:.1f} TFLOP/s.\n",
        "Memory of a training step at 512 pixels, 4 + 4 samples, bf16 autocast, in GB (10^9 bytes): counted, not "
        "measured. Allow a gigabyte more for CUDA and the allocator.\n",
        table_of(memory),
        f"The same of other stages. A sample's Fisher is the squares of two draws of {FISHER_TIMESTEPS // 2} "
        "timesteps; sums that are not on the GPU are in main memory, and the first draw waits there.\n",
        table_of(stage_memory),
        f"What EWC adds to a step of plain fine-tuning: {EWC_PASSES} float32 numbers a weight are read or written, at "
        f"{BANDWIDTH / 1e12:.1f} TB/s, by the samples of a step. Counted, not measured.\n",
        table_of([{k: f"{v:.1%}" if isinstance(v, float) else v for k, v in row.items()} for row in ewc_share]),
    )
    report = {
        "times": times,
        "authors": authors,
        "memory": memory,
        "stage_memory": stage_memory,
        "ewc_share": ewc_share,
    }
    return report, "\n".join(parts)
