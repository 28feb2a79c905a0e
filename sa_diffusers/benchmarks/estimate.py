"""What Stable Diffusion 1.4 costs on a GPU that is not at hand: counted operations and bytes, at stated rates.

The rate is an assumption, so here is what it stands on. MosaicML's README (github.com/mosaicml/diffusion) reports 290
images a second for training Stable Diffusion 2's UNet at 512 pixels on 8 A100s. At three forward passes a step, as
counted here, that is 87 TFLOP/s an A100, 28 % of its dense bf16 peak of 312. An H200's peak is 989 TFLOP/s, 3.2 times
as much, its memory 2.4 times as fast (4.8 against 2.0 TB/s); were all of the work bound by memory, the same code would
come to 209 TFLOP/s, 21 % of the peak. So 20 % is taken, with 28 % as if it were bound by arithmetic alone, and 12 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import nn

from sa_diffusers.families.text_to_image import PIXELS_AT_ONCE
from sa_diffusers.lora import adapted_layers, add_lora
from sa_diffusers.objectives import ewc

from .architectures import build_unet, build_vae
from .counting import decoding_bytes, decoding_flops, forward_bytes, forward_flops, step_bytes, weight_bytes
from .stages import LORA_RANK
from .tables import duration, markdown
from .whole_run import AUTHORS, FROM_NOTHING, SHARED, Costs, Job, extrapolate


PEAK = 989e12  # dense bf16 operations a second of an H200
BANDWIDTH = 3.4e12  # bytes a second: 70 % of the 4.8 TB/s of its memory
SHARES = (0.28, 0.20, 0.12)  # of the peak that are sustained
WEIGHTS = 4 * 859_520_964  # bytes of the UNet in float32
AUTHORS_HOURS = 500  # GPU hours of the authors' code for one concept on an A6000 (arXiv 2410.05664, Table 3)
BACKWARD = 2  # a backward pass costs two forward passes
FISHER_PASSES = 32  # reads and writes of a float32 number a weight when a sample's two draws are squared and added up
FISHER_TIMESTEPS = 20  # of a sample, two draws of 10
STEP_PASSES = 32  # the same for clipping, AdamW, EWC's gradient and the casts of weights to bf16
EWC_PASSES = 7  # of these for EWC's gradient: 3 for the weights' change, 4 to add its product with the Fisher
SAMPLED_AT_ONCE = 8  # images
CAST_PASSES = 1.5  # the same for the casts alone, of a forward pass that draws
ADAM_8BIT = 2 * (1 + 4 / 256)  # bytes a weight: two moments, and a float32 scale for every 256 of them


@dataclass(frozen=True)
class Training:
    """How a training step keeps its memory small.

    Attributes:
        rank: of LoRA on attention; None: all weights of the UNet are trained.
        checkpointing: recompute activations.
        adam_bits: 32 or 8.
        fisher_bytes: a weight; 0: kept in main memory.
        dtype: of autocast; None: none.
    """

    name: str
    rank: int | None = None
    checkpointing: bool = False
    adam_bits: int = 32
    fisher_bytes: int = 4
    dtype: torch.dtype | None = torch.bfloat16


TRAININGS = (
    Training("full"),
    Training("full, checkpointing", checkpointing=True),
    Training("full, checkpointing, bf16 Fisher", checkpointing=True, fisher_bytes=2),
    Training("full, checkpointing, 8-bit Adam", checkpointing=True, adam_bits=8),
    Training("full, checkpointing, 8-bit Adam, bf16 Fisher", checkpointing=True, adam_bits=8, fisher_bytes=2),
    Training(f"LoRA of rank {LORA_RANK}", rank=LORA_RANK),
    Training(f"LoRA of rank {LORA_RANK}, checkpointing", rank=LORA_RANK, checkpointing=True),
)


@lru_cache
def operations() -> tuple[int, int]:
    """Floating point operations of a UNet pass of one sample at 512 pixels, and of decoding it."""
    return forward_flops(_on_meta(build_unet)), decoding_flops(_on_meta(build_vae))


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


def estimate_times(jobs: Sequence[Job] = (FROM_NOTHING, SHARED)) -> list[dict[str, Any]]:
    """One row a job and a share of an H200's peak: how long each stage takes."""
    rows = []
    for job in jobs:
        for share in SHARES:
            seconds = extrapolate(job, estimate_costs(share * PEAK))
            row = {"job": job.name, "share of peak": f"{share:.0%}", "TFLOP/s": round(share * PEAK / 1e12)}
            rows.append(
                row | {stage: duration(value) for stage, value in seconds.items()} | {"seconds": seconds["total"]}
            )
    return rows


def share_needed(job: Job, seconds: float) -> float:
    """The share of an H200's peak at which a job takes that long; time is one part over the rate and one beside it."""
    at_peak, at_half = (extrapolate(job, estimate_costs(share * PEAK))["total"] for share in (1, 0.5))
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


def estimate_memory(trainings: Sequence[Training] = TRAININGS, batch_size: int = 8) -> list[dict[str, Any]]:
    """One row a way of training at 512 pixels: gigabytes (10^9) of each part, and the most at any moment of a step.

    Counted, not measured: a process holds about a gigabyte more (CUDA's context, and what the allocator cannot use).
    The replay's targets come from a copy of the UNet as it was, whose weights are EWC's anchor, too; for LoRA, from
    the UNet without its adapters. Text encoder and VAE are in main memory meanwhile.

    Args:
        batch_size: surrogate and replay samples together.
    """
    return [_memory(training, batch_size) for training in trainings]


def _memory(training: Training, batch_size: int) -> dict[str, Any]:
    unet = _on_meta(build_unet)
    whole = weight_bytes(unet)
    if training.rank:
        changes = add_lora(unet, adapted_layers(unet, "full", "attention"), training.rank, training.rank, seed=0)
        by_name = dict(unet.named_parameters())
        held_by_fisher = sum(by_name[_base_weight(name)].numel() for name in changes)
    else:
        held_by_fisher = whole // 4
    trained = weight_bytes(unet, trained_only=True)
    parts = {
        "weights": weight_bytes(unet),
        "Adam": trained * 2 if training.adam_bits == 32 else trained / 4 * ADAM_8BIT,
        "frozen copy or anchor": 0 if training.rank else whole,
        "Fisher": held_by_fisher * training.fisher_bytes,
    }
    passes = step_bytes(unet, batch_size, training.dtype, training.checkpointing)
    # AdamW's square roots are a copy of the weights, which 8-bit Adam does without.
    sizes = [p.numel() for p in unet.parameters() if p.requires_grad]
    temporary = max(trained if training.adam_bits == 32 else 0, ewc_temporary(sizes, training.fisher_bytes != 4))
    peak = sum(parts.values()) + max(passes, trained + temporary)
    row = {"training": training.name, **parts, "gradients": trained, "activations": passes - trained}
    row |= {"update's temporaries": temporary, "peak": peak}
    return {key: value if isinstance(value, str) else value / 1e9 for key, value in row.items()}


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


def estimate_stage_memory() -> list[dict[str, Any]]:
    """One row a stage beside training, in gigabytes: drawing guided images, decoding them, the Fisher of a sample."""
    unet = _on_meta(build_unet)
    whole = weight_bytes(unet)
    drawing = forward_bytes(unet, 2 * SAMPLED_AT_ONCE, torch.bfloat16)
    vae = _on_meta(build_vae)
    at_once = PIXELS_AT_ONCE // 512**2
    rows = [
        {"stage": f"sampling, {SAMPLED_AT_ONCE} latents", "weights": whole, "sums": 0, "draws and passes": drawing},
        {
            "stage": f"decoding, {at_once} at once",
            "weights": whole + weight_bytes(vae),
            "sums": 0,
            "draws and passes": decoding_bytes(vae, at_once),
        },
    ]
    unet.requires_grad_(True)
    for checkpointing, on_device in product((False, True), repeat=2):
        passes = step_bytes(unet, FISHER_TIMESTEPS // 2, torch.bfloat16, checkpointing)
        # The first draw's gradient waits where the sums are while the second is made, in one pass.
        name = f"Fisher{', checkpointing' * checkpointing}{', sums on the GPU' * on_device}"
        sums = whole * on_device
        rows.append({"stage": name, "weights": whole, "sums": sums, "draws and passes": whole * on_device + passes})
    for row in rows:
        row["peak"] = row["weights"] + row["sums"] + row["draws and passes"]
    return [{k: v if isinstance(v, str) else v / 1e9 for k, v in row.items()} for row in rows]


def ewc_temporary(sizes: Sequence[int], cast_fisher: bool) -> int:
    """At most so many bytes are taken while EWC's gradient is added, in float32 and group by group.

    A group needs its pull, and its Fisher where that is kept in another precision.

    Args:
        sizes: weights of each trained tensor.
    """
    return 4 * (1 + cast_fisher) * min(sum(sizes), ewc.GROUP_SIZE + max(sizes))


def _base_weight(name: str) -> str:
    return name.removesuffix(".weight") + ".base_layer.weight"


def _on_meta(build: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


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
        f"the H200's memory, 2.4 times as fast, would make of that. {_limits()}\n",
        markdown(shown),
        f"The authors' settings are {authors['operations']:.3g} operations, for which {AUTHORS_HOURS} GPU hours on an "
        f"A6000 were published: {authors['rate'] / 1e12:.1f} TFLOP/s.\n",
        "Memory of a training step at 512 pixels, 4 + 4 samples, bf16 autocast, in GB (10^9 bytes): counted, not "
        "measured. Allow a gigabyte more for CUDA and the allocator.\n",
        markdown(memory),
        f"The same of other stages. A sample's Fisher is the squares of two draws of {FISHER_TIMESTEPS // 2} "
        "timesteps; sums that are not on the GPU are in main memory, and the first draw waits there.\n",
        markdown(stage_memory),
        f"What EWC adds to a step of plain fine-tuning: {EWC_PASSES} float32 numbers a weight are read or written, at "
        f"{BANDWIDTH / 1e12:.1f} TB/s, by the samples of a step. Counted, not measured.\n",
        markdown([{k: f"{v:.1%}" if isinstance(v, float) else v for k, v in row.items()} for row in ewc_share]),
    )
    report = {"times": times, "authors": authors, "memory": memory, "stage_memory": stage_memory, "ewc": ewc_share}
    return report, "\n".join(parts)
