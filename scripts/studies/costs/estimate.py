"""What Stable Diffusion 1.4 costs on a GPU that is not at hand: counted operations and bytes, at stated rates.

The rate is an assumption, so here is what it stands on. MosaicML's README (github.com/mosaicml/diffusion) reports 290
images a second for training Stable Diffusion 2's UNet at 512 pixels on 8 A100s. At three forward passes a step, as
counted here, that is 87 TFLOP/s an A100, 28 % of its dense bf16 peak of 312. An H200's peak is 989 TFLOP/s, 3.2 times
as much, its memory 2.4 times as fast (4.8 against 2.0 TB/s); were all of the work bound by memory, the same code would
come to 209 TFLOP/s, 21 % of the peak. So 20 % is taken, with 28 % as if it were bound by arithmetic alone, and 12 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sa_diffusers.runs.options import ForgetConfig
from studies.costs.architectures import build_unet, build_vae
from studies.costs.counting import decoding_flops, forward_flops
from studies.costs.memory import (
    FISHER_TIMESTEPS,
    SAMPLED_AT_ONCE,
    estimate_memory,
    estimate_stage_memory,
    on_meta,
)
from studies.rows import duration, table_of


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


@dataclass(frozen=True)
class Job:
    """How much of everything a run does.

    Attributes:
        images: drawn for replay, Fisher and surrogate.
        sampler_steps: of each; two UNet passes each, for guidance.
        fisher_evaluations: gradients of one sample at one timestep.
        train_steps, samples_per_step: surrogate and replay samples together.
        evaluation_images: drawn and decoded, by both models together.
    """

    name: str
    images: int
    sampler_steps: int
    fisher_evaluations: int
    train_steps: int
    samples_per_step: int
    evaluation_images: int = 0


@dataclass(frozen=True)
class Costs:
    """Seconds of one unit: a sampler's step of one image, a Fisher evaluation, a sample in a training step."""

    image_step: float
    fisher_evaluation: float
    training_sample: float
    decoded_image: float = 0.0


# Their configurations and README: 5,000 replay and 1,000 surrogate pictures; every timestep of 5,000 samples; 200
# epochs of 1,000 pairs in steps of 4 + 4 a GPU, here counted as steps of one GPU.
AUTHORS = Job("the authors' settings", 6_000, 50, 5_000 * 1_000, 200 * 1_000 // 4, 8)

# A run at the size that Stable Diffusion 1.4 asks for, with nothing at hand, and with the samples and the Fisher of
# the model shared by all concepts. Pictures: 5,000 for replay, and a tenth of them anew without the concept (those of
# the empty prompt); 400 of the surrogate; the evaluation's 200 prompts before and after.
FROM_NOTHING = Job("nothing cached", 5_000 + 500 + 400, 20, 20_000, 1_000, 8, 400)
SHARED = Job("samples and Fisher shared", 500 + 400, 20, 0, 1_000, 8, 400)


def job_of(config: ForgetConfig, name: str) -> Job:
    """The run of a configuration, without its evaluation; where no siblings are known, the empty prompt's samples are
    drawn anew without the concept."""
    config = config.resolved()
    redrawn = {"open": config.empty_prompt_fraction, "all": 1.0}.get(config.replay_negative, 0.0)
    terms = 1000 if config.terms is None else 2 * config.terms
    return Job(
        name,
        round(config.num_samples * (1 + redrawn)) + config.num_surrogate_samples,
        config.num_inference_steps,
        config.fisher_samples * terms if config.ewc_lambda else 0,
        config.num_train_steps,
        2 * config.train_batch_size,
    )


def extrapolate(job: Job, costs: Costs) -> dict[str, float]:
    """Seconds of each stage of a job and their total."""
    stages = {
        "sampling": job.images * job.sampler_steps * costs.image_step,
        "Fisher": job.fisher_evaluations * costs.fisher_evaluation,
        "training": job.train_steps * job.samples_per_step * costs.training_sample,
        "evaluation": job.evaluation_images * (job.sampler_steps * costs.image_step + costs.decoded_image),
    }
    return stages | {"total": sum(stages.values())}


def measured_costs(rows: list[Mapping], sampling: tuple[str, int], fisher: str, step: tuple[str, int]) -> Costs:
    """Costs from rows of `timing.measure`.

    Args:
        sampling: name of the way, and its sampler's steps.
        fisher: name of the way.
        step: name of the way, and samples in one of its steps.
    """
    seconds = {(row["stage"], row["way"]): row["seconds"] for row in rows}
    return Costs(
        seconds["sampling", sampling[0]] / sampling[1],
        seconds["Fisher", fisher],
        seconds["training step", step[0]] / step[1],
    )


@lru_cache
def operations() -> tuple[int, int]:
    """Floating point operations of a UNet pass of one sample at 512 pixels, and of decoding it."""
    return forward_flops(on_meta(build_unet)), decoding_flops(on_meta(build_vae))


def estimate_costs(rate: float, counted: tuple[int, int] | None = None, weights: int = WEIGHTS) -> Costs:
    """Seconds of a unit on a GPU that sustains `rate` operations a second, for steps of 4 + 4 samples.

    A training step's replay half also needs a forward pass of the frozen model; activations are kept. What touches
    every weight without much arithmetic is charged at the memory's bandwidth.

    Args:
        counted: as `operations`; None: those.
        weights: bytes of the trained part in float32.
    """
    forward, decoding = (count / rate for count in counted or operations())
    return Costs(
        image_step=2 * forward + CAST_PASSES * weights / BANDWIDTH / SAMPLED_AT_ONCE,
        fisher_evaluation=(1 + BACKWARD) * forward + FISHER_PASSES * weights / BANDWIDTH / FISHER_TIMESTEPS,
        training_sample=(1 + BACKWARD + 0.5) * forward
        + STEP_PASSES * weights / BANDWIDTH / FROM_NOTHING.samples_per_step,
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


def estimate_times() -> list[dict[str, Any]]:
    """One row a job and a share of an H200's peak: how long each stage takes."""
    rows = []
    for job in (FROM_NOTHING, SHARED):
        for share in SHARES:
            seconds = job_seconds(job, share)
            row = {"job": job.name, "share of peak": f"{share:.0%}", "TFLOP/s": round(share * PEAK / 1e12)}
            row |= {stage: duration(value) for stage, value in seconds.items()}
            rows.append(row | {"seconds": seconds["total"]})
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


def estimate_report() -> tuple[dict[str, Any], str]:
    """Everything, for JSON, and as Markdown."""
    authors, ewc_share = authors_operations(), estimate_ewc()
    report = {"times": estimate_times(), "authors": authors, "memory": estimate_memory()}
    report |= {"stage_memory": estimate_stage_memory(), "ewc_share": ewc_share}
    shown = [{key: value for key, value in row.items() if key != "seconds"} for row in report["times"]]
    limits = " ".join(
        f"With {job.name}, {minutes} minutes take {share_needed(job, 60 * minutes):.1%}."
        for job, minutes in ((FROM_NOTHING, 30), (SHARED, 6))
    )
    parts = (
        "Stable Diffusion 1.4 on one H200, estimated from counted operations: not measured. A UNet pass of one sample "
        f"at 512 pixels is {operations()[0] / 1e9:.0f} GFLOP. Rates are shares of the dense bf16 "
        f"peak of {PEAK / 1e12:.0f} TFLOP/s. Published training on A100s sustains 28 % of theirs; 20 % is about what "
        f"the H200's memory, 2.4 times as fast, would make of that. Files are read and written at "
        f"{DISK / 1e9:.0f} GB/s, with {CHECKPOINTS} checkpoints. {limits}\n",
        table_of(shown),
        f"The authors' settings are {authors['operations']:.3g} operations, for which {AUTHORS_HOURS} GPU hours on an "
        f"A6000 were published: {authors['rate'] / 1e12:.1f} TFLOP/s.\n",
        "Memory of a training step at 512 pixels, 4 + 4 samples, bf16 autocast, in GB (10^9 bytes): counted, not "
        "measured. Allow a gigabyte more for CUDA and the allocator.\n",
        table_of(report["memory"]),
        f"The same of other stages. A sample's Fisher is the squares of two draws of {FISHER_TIMESTEPS // 2} "
        "timesteps; sums that are not on the GPU are in main memory, and the first draw waits there.\n",
        table_of(report["stage_memory"]),
        f"What EWC adds to a step of plain fine-tuning: {EWC_PASSES} float32 numbers a weight are read or written, at "
        f"{BANDWIDTH / 1e12:.1f} TB/s, by the samples of a step. Counted, not measured.\n",
        table_of(
            [{k: f"{v:.1%}" if isinstance(v, float) else v for k, v in row.items()} for row in report["ewc_share"]]
        ),
    )
    return report, "\n".join(parts)
