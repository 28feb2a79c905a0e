"""The only optimisation loop: minimise any objective, with accelerate, resumable at any step."""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from sa_diffusers.checkpoints import Checkpoints
from sa_diffusers.objectives import NestedBatch, Objective
from sa_diffusers.seeding import derive_seed, seeded


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Options of training a base model that say how the run is watched, not what it computes.
NOT_IDENTITY = (
    "output_dir", "report_to", "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "data_dir",
    "num_threads",
)  # fmt: skip
MAX_SKIPPED = 20  # a gradient scaler skips a step now and then; this many in a row mean that it finds no scale


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite."""


def check_ranges(config: Any, *names: str, zero: bool = False) -> None:
    """Raise ValueError for a field that is not above 0 (or, with `zero`, below it); None is no number and is left."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
            raise ValueError(f"expected {name} {'>=' if zero else '>'} 0, got {value}")


@dataclass
class TrainingConfig:
    """Settings of one optimisation. The learning rate is used as written, whatever the number of processes.

    Raises:
        ValueError: a number out of its range; step rules without their schedule, the schedule without step rules, or
            rules of another form.
    """

    num_train_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    train_batch_size: int = field(
        default=8,
        metadata={
            "help": "Samples of each kind in an optimiser step, shared by all processes and accumulation steps."
        },
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate; never scaled silently."})
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "piecewise_constant"] = field(
        default="constant_with_warmup", metadata={"help": "Schedule, by diffusers' name."}
    )
    lr_warmup_steps: int = field(
        default=0, metadata={"help": "Optimiser steps of linear warm-up; constant and piecewise_constant have none."}
    )
    lr_step_rules: str | None = field(
        default=None,
        metadata={
            "help": "For piecewise_constant: factors of the learning rate, each with the step before which it holds, "
            "and the last one alone. 1:1000,0.1:2000,0.01 is 1 for 1000 steps, 0.1 up to step 2000, then 0.01."
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first decay rate."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second decay rate."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "AdamW's weight decay. It pulls to 0, not to the anchor."}
    )
    max_grad_norm: float | None = field(default=1.0, metadata={"help": "Clip the gradient to this norm; null: never."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Parts into which each process cuts its share of a batch to save memory."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "no, fp16 or bf16; null: what `accelerate config` or `accelerate launch` says."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Largest decay of the weight average that is saved, (1 + n) / (10 + n) at step n; null: none."
        },
    )
    checkpointing_steps: int | None = field(default=100, metadata={"help": "Save a checkpoint every so many steps."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept, the newest."})
    logging_steps: int = field(default=5, metadata={"help": "Record losses every so many steps."})
    report_to: str | None = field(default=None, metadata={"help": "Tracker: tensorboard, wandb, ...; null: none."})

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "num_train_steps", "train_batch_size", "learning_rate", "gradient_accumulation_steps", "max_grad_norm",
            "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
        )  # fmt: skip
        check_ranges(self, "lr_warmup_steps", "weight_decay", "adam_epsilon", zero=True)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected 0 <= {name} < 1, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"expected 0 <= ema_decay < 1, got {self.ema_decay}")
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError(
                f"lr_scheduler piecewise_constant and lr_step_rules need each other, got {self.lr_scheduler} and "
                f"{self.lr_step_rules!r}; set both or neither"
            )
        number = r"[0-9]*\.?[0-9]+(e-?[0-9]+)?"
        if self.lr_step_rules is not None and not re.fullmatch(rf"({number}:[0-9]+,)*{number}", self.lr_step_rules):
            raise ValueError(f"expected lr_step_rules such as 1:1000,0.1:2000,0.01, got {self.lr_step_rules!r}")


Callback = Callable[[int, dict], bool | None]  # (step, history row); returning True ends training early


def train(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int], NestedBatch],
    config: TrainingConfig,
    *,
    seed: int,
    checkpoint_dir: Path | None = None,
    callback: Callback | None = None,
    callback_steps: int | None = None,
    log_dir: Path | None = None,
    description: str = "train",
) -> list[dict]:
    """Minimise `objective` over the parameters of `model` that require gradients, in place.

    Every random number is a function of (seed, step), and a batch is drawn whole before processes and accumulation
    steps share it. So one process or several, accumulated or not, interrupted or not, give the same weights up to
    rounding. A model with dropout draws for itself and one with batch norm looks at its part of the batch: those give
    the same weights, interrupted or not, only while processes and accumulation stay as they are.

    Args:
        model: left in eval mode with the trained weights (their moving average if `ema_decay` is set).
        batches: the whole batch of an optimiser step on the CPU, as a function of the step.
        checkpoint_dir: where to keep checkpoints and to resume from the newest; None: keep none.
        callback: called every `callback_steps` steps with the weights that would be saved in `model`.
        log_dir: where trackers such as tensorboard write.

    Returns:
        One dict per logged step: step, loss, its parts, grad_norm, learning_rate.

    Raises:
        ValueError: the batch does not divide by processes x accumulation steps.
        TrainingDiverged: a loss or gradient is not finite; the last checkpoint is kept.
    """
    # Its own: what an accelerator has prepared and registered stays in its checkpoints for good.
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=config.report_to, project_dir=log_dir)
    _check_shares(accelerator, config)
    if config.report_to:
        accelerator.init_trackers(description, config={k: v for k, v in asdict(config).items() if v is not None})
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.num_train_steps,
    )
    ema = None if config.ema_decay is None else EMAModel(parameters, decay=config.ema_decay)
    # The schedule is not prepared: it steps once an optimiser step, where a prepared one would step once a process.
    prepared, optimizer = accelerator.prepare(model, optimizer)
    checkpoints = Checkpoints(accelerator, checkpoint_dir, config.checkpoints_total_limit, scheduler, ema)
    first_step, history = checkpoints.resume()
    if history and history[-1].get("stopped"):
        first_step = config.num_train_steps

    model.train()
    drops = any(isinstance(module, DROPOUTS) and module.p > 0 for module in model.modules())
    skipped = 0
    steps = range(first_step, config.num_train_steps)
    progress = tqdm(
        steps,
        initial=first_step,
        total=config.num_train_steps,
        desc=description,
        disable=not accelerator.is_main_process,
        mininterval=1,
    )
    for step in progress:
        batch = objective.draw(batches(step), seeded(seed, "objective", step))
        if drops:  # dropout takes no generator; each process drops for its own share of the batch
            torch.manual_seed(derive_seed(seed, "model", step, accelerator.process_index))
        logs = _backward(accelerator, prepared, objective, batch, config.gradient_accumulation_steps)
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(optimizer)
        objective.add_gradient()
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        _check_finite(accelerator, step, logs["loss"], norm, checkpoints)
        calling = callback is not None and callback_steps is not None and (step + 1) % callback_steps == 0
        logging = step in (0, config.num_train_steps - 1) or (step + 1) % config.logging_steps == 0
        if logging or calling:  # before the step, as the loss is
            logs |= objective.regularisation()
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if skipped == MAX_SKIPPED:
            raise TrainingDiverged(f"{skipped} steps in a row overflowed in float16 up to step {step + 1}; use bf16")
        optimizer.zero_grad()
        scheduler.step()
        if ema is not None:
            ema.step(parameters)
        stop = False
        if logging or calling:
            row = _history_row(accelerator, step + 1, logs, norm, learning_rate)
            history.append(row)
            progress.set_postfix({"loss": f"{row['loss']:.4g}"})
            if calling:
                stop = _with_average(model, parameters, ema, callback, step + 1, row)
                if stop:
                    row["stopped"] = True
            if config.report_to:
                accelerator.log({k: v for k, v in row.items() if k not in ("step", "stopped")}, step=step + 1)
        last = stop or step + 1 == config.num_train_steps
        if config.checkpointing_steps and (last or (step + 1) % config.checkpointing_steps == 0):
            checkpoints.save(step + 1, history)
        if stop:
            break
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # else the model would autocast for good
    if ema is not None:
        ema.copy_to(parameters)
    if config.gradient_checkpointing:
        model.disable_gradient_checkpointing()
    if config.report_to:
        accelerator.end_training()
    model.eval()
    return history


def _check_shares(accelerator: Accelerator, config: TrainingConfig) -> None:
    shares = accelerator.num_processes * config.gradient_accumulation_steps
    if config.train_batch_size % shares:
        raise ValueError(
            f"train_batch_size {config.train_batch_size} does not divide by {accelerator.num_processes} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; choose a multiple of {shares}"
        )


def _backward(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batch: NestedBatch, num_parts: int
) -> dict[str, Tensor]:
    """Accumulate the gradient of this process's share of a batch, in `num_parts` parts; returns their mean losses."""
    shares, first = accelerator.num_processes * num_parts, accelerator.process_index * num_parts
    logs: dict[str, Tensor] = {}
    for part in range(num_parts):
        rows = slice(first + part, None, shares)
        # Processes exchange gradients once an optimiser step, with the last part.
        with nullcontext() if part == num_parts - 1 else accelerator.no_sync(model):
            loss, parts = objective(model, _take(batch, rows, accelerator.device))
            accelerator.backward(loss / num_parts)
        for name, value in {"loss": loss.detach(), **parts}.items():
            logs[name] = logs.get(name, 0) + value / num_parts
    return logs


def infinite_indices(num_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The indices of batch `step` of an endless walk over a data set, reshuffled each epoch: no sample is left out."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), num_samples)
        indices += _epoch_order(num_samples, epoch, seed)[offset : offset + batch_size - len(indices)].tolist()
    return indices


@lru_cache(maxsize=8)  # a permutation of a large set takes longer than a step of a small model
def _epoch_order(num_samples: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(num_samples, generator=seeded(seed, "epoch", epoch))


def _take(batch: NestedBatch, rows: slice, device: torch.device) -> NestedBatch:
    return {
        key: _take(value, rows, device) if isinstance(value, dict) else value[rows].to(device, non_blocking=True)
        for key, value in batch.items()
    }


def _check_finite(accelerator: Accelerator, step: int, loss: Tensor, norm: Tensor, checkpoints: Checkpoints) -> None:
    # With a gradient scaler an infinite gradient is ordinary: the scaler skips the step and lowers its factor.
    finite = torch.isfinite(loss.detach()) and (accelerator.scaler is not None or torch.isfinite(norm))
    if finite:
        return
    kept = checkpoints.existing()
    where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    raise TrainingDiverged(
        f"loss {loss.item():.4g} and gradient norm {float(norm):.4g} at step {step + 1}: one is not finite; {where}. "
        "Lower the learning rate or ewc_lambda, or train in float32 or bf16, in another output folder."
    )


def _history_row(accelerator: Accelerator, step: int, logs: dict, norm: Tensor, learning_rate: float) -> dict:
    """Means over processes as plain numbers; the norm and EWC are the same on all of them."""
    means = {name: accelerator.reduce(value.float(), "mean").item() for name, value in logs.items()}
    return {"step": step, **means, "grad_norm": float(norm), "learning_rate": learning_rate}


def _with_average(
    model: nn.Module, parameters: Iterable, ema: EMAModel | None, callback: Callback, step: int, row: dict
) -> bool:
    """Run the callback with the averaged weights in place and the model in eval mode."""
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    model.eval()
    try:
        return bool(callback(step, row))
    finally:
        model.train()
        if ema is not None:
            ema.restore(parameters)
