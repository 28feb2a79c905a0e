"""The only optimisation loop: minimise any objective, with accelerate, resumable at any step."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch, take, to
from sa_diffusers.core.objectives import Objective
from sa_diffusers.core.seeding import derive_seed, seeded
from sa_diffusers.io.processes import tell, working
from sa_diffusers.models.precision import autocast_forward, compute_dtype, mixed_precision
from sa_diffusers.training.checkpoints import Checkpoints
from sa_diffusers.training.launching import check_launch
from sa_diffusers.training.optimisation import Optimisation, TrainingDiverged
from sa_diffusers.training.options import TrainingConfig


__all__ = ["TrainingConfig", "TrainingDiverged", "infinite_indices", "train"]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

Callback = Callable[[int, dict], bool | None]  # (step, history row); returning True ends training early


def train(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int], Batch],
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
    rounding (but for objectives that say otherwise); with dropout or batch norm, only while both stay as they are. On
    return every process has all weights.

    Args:
        model: left in eval mode with the trained weights (their moving average if `ema_decay` is set).
        objective: its terms that depend on the weights alone must be of this very model's weights.
        batches: the whole batch of an optimiser step on the CPU, as a function of the step.
        checkpoint_dir: where to keep checkpoints and to resume from the newest; None: keep none.
        callback: called by every process, every `callback_steps` steps, with the step and its row of the history,
            while `model` has the weights that would be saved; training ends where it returns True.
        log_dir: where trackers such as tensorboard write.

    Returns:
        One dict per logged step: step, loss, its parts, grad_norm (None where float16 skipped it), learning_rate.

    Raises:
        ValueError: the batch does not divide by processes x accumulation steps; a launch that is not handled.
        TrainingDiverged: a loss or gradient is not finite; the last checkpoint is kept.
    """
    check_launch(config)
    precision = mixed_precision(config.mixed_precision)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        precision = "no"  # it would keep the weights in half precision; `Optimisation` autocasts instead
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # as its own error message says: else a program could train in one only
    # Its own: what an accelerator has prepared and registered stays in its checkpoints for good.
    accelerator = Accelerator(mixed_precision=precision, log_with=config.report_to, project_dir=log_dir)
    if config.report_to:
        accelerator.init_trackers(description, config={k: v for k, v in asdict(config).items() if v is not None})
    optimisation = Optimisation(accelerator, model, config)
    if optimisation.copied:
        objective.attach(optimisation.parameters, optimisation.prepared)
    checkpoints = Checkpoints(accelerator, checkpoint_dir, config.checkpoints_total_limit, optimisation.stateful)
    loop = _Loop(accelerator, optimisation, objective, config, checkpoints, seed, callback, callback_steps)
    try:
        history = loop.run(batches, description)
        optimisation.finish()
    finally:
        optimisation.close()
        for tracker in accelerator.trackers:  # `end_training` would part the processes too, which have more to do
            tracker.finish()
    return history


@dataclass
class _Loop:
    """One optimisation from the newest checkpoint to its end."""

    accelerator: Accelerator
    optimisation: Optimisation
    objective: Objective
    config: TrainingConfig
    checkpoints: Checkpoints
    seed: int
    callback: Callback | None
    callback_steps: int | None

    def run(self, batches: Callable[[int], Batch], description: str) -> list[dict]:
        """Take all steps that are left; returns the whole history."""
        config, num_steps = self.config, self.config.num_train_steps
        first_step, history = self.checkpoints.resume()
        if history and history[-1].get("stopped"):
            first_step = num_steps
        self.optimisation.prepared.train()
        modules = self.optimisation.prepared.modules()
        drops = any(isinstance(module, DROPOUTS) and module.p > 0 for module in modules)
        left = range(first_step, num_steps)
        with working(description, num_steps, "steps", first_step) as advance:
            for step in left:
                batch = self.objective.draw(batches(step), seeded(self.seed, "objective", step))
                if drops:  # dropout takes no generator; each process drops for its own share of the batch
                    torch.manual_seed(derive_seed(self.seed, "model", step, self.accelerator.process_index))
                row = self._step(step, batch)
                history += [] if row is None else [row]
                stop = row is not None and bool(row.get("stopped"))
                last = stop or step + 1 == num_steps
                if last:
                    self._check_trained(step, batch)
                due = last or (step + 1) % (config.checkpointing_steps or num_steps) == 0
                try:
                    if row is not None:
                        tell("losses", **row)
                    advance()
                except Exception:  # of a callback, which may stop a run: nothing that was trained is lost
                    due = self.accelerator.num_processes == 1
                    raise
                finally:
                    if config.checkpointing_steps and due:
                        self.checkpoints.save(step + 1, history)
                if stop:
                    break
        return history

    def _step(self, step: int, batch: Batch) -> dict | None:
        """One optimiser step; returns its row of the history if it is logged, "stopped" if the callback says so."""
        config, optimisation = self.config, self.optimisation
        logs = self._backward(batch)
        calling = self.callback is not None and self.callback_steps and (step + 1) % self.callback_steps == 0
        logging = calling or step in (0, config.num_train_steps - 1) or (step + 1) % config.logging_steps == 0
        if logging:  # before the step, as the loss is
            logs |= self.objective.regularisation()
        learning_rate = optimisation.learning_rate
        norm = optimisation.clip()
        self._check_finite(f"at step {step + 1}", logs["loss"], norm)
        optimisation.step()
        if not logging:
            return None
        # Means over processes as plain numbers; the norm and EWC are the same on all of them.
        means = {name: self.accelerator.reduce(value.float(), "mean").item() for name, value in logs.items()}
        # Not finite only where the gradient scaler skips the step, which is ordinary and no number for a file.
        finite = float(norm) if torch.isfinite(norm) else None
        row = {"step": step + 1, **means, "grad_norm": finite, "learning_rate": learning_rate}
        if calling:
            with optimisation.shown():
                try:
                    stop = self.callback(step + 1, row)
                except FloatingPointError as error:
                    raise self._diverged(f"after step {step + 1} {error}") from error
            if stop:
                row["stopped"] = True
        if config.report_to:
            numbers = {k: v for k, v in row.items() if k not in ("step", "stopped") and v is not None}
            self.accelerator.log(numbers, step=step + 1)
        return row

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Make the gradient of a step from this process's share of a batch, part by part; returns the mean losses."""
        optimisation, num_parts = self.optimisation, self.config.gradient_accumulation_steps
        logs: dict[str, Tensor] = {}
        for part in range(num_parts):
            last = part == num_parts - 1
            with optimisation.accumulating(last):
                loss, parts = self.objective(optimisation.prepared, self._share(batch, part))
                optimisation.backward(loss / num_parts, last, self.objective.add_gradient)
            for name, value in {"loss": loss.detach(), **parts}.items():
                logs[name] = logs.get(name, 0) + value / num_parts
        return logs

    def _share(self, batch: Batch, part: int) -> Batch:
        """A part of this process's share of a batch, on its device."""
        accelerator, num_parts = self.accelerator, self.config.gradient_accumulation_steps
        mine = slice(accelerator.process_index * num_parts + part, None, accelerator.num_processes * num_parts)
        return to(take(batch, mine), accelerator.device)

    def _check_trained(self, step: int, batch: Batch) -> None:
        """Raise TrainingDiverged where the weights to be saved have no finite loss: no step comes that would tell."""
        optimisation = self.optimisation
        # Of weights in parts the whole model has no checkpointing or autocast of its own, and no objective of theirs a
        # gradient.
        dtype = compute_dtype(self.config.mixed_precision) if optimisation.copied else None
        with (
            optimisation.shown(),
            autocast_forward(optimisation.model, dtype),
            torch.set_grad_enabled(not optimisation.copied),
        ):
            loss, _ = self.objective(optimisation.model, self._share(batch, 0))
        # All processes must agree: one that alone raised would leave the others waiting for it.
        self._check_finite(f"after step {step + 1}", self.accelerator.reduce(loss.detach(), "mean"))

    def _check_finite(self, when: str, loss: Tensor, norm: Tensor | None = None) -> None:
        # With a gradient scaler an infinite gradient is ordinary: the scaler skips the step and lowers its factor.
        if not torch.isfinite(loss) or (norm is not None and not self.accelerator.scaler and not torch.isfinite(norm)):
            found = f"loss {loss.item():.4g}" + ("" if norm is None else f" and gradient norm {float(norm):.4g}")
            raise self._diverged(f"{found} {when}: one is not finite")

    def _diverged(self, found: str) -> TrainingDiverged:
        kept = self.checkpoints.existing()
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        return TrainingDiverged(
            f"training diverged: {found}; {where}. Lower the learning rate or ewc_lambda, or train in float32 or bf16 "
            "in another output folder."
        )


def infinite_indices(num_samples: int, batch_size: int, step: int, seed: int, shares: int = 1) -> list[int]:
    """The indices of batch `step` of an endless walk over a data set, reshuffled each epoch: no sample is left out.

    Args:
        shares: sample i belongs to share i % shares; the walk takes one of each in turn, and as many of each.
    """
    indices: list[int] = []
    position, length = step * batch_size, num_samples // shares * shares
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), length)
        indices += _epoch_order(length, epoch, seed, shares)[offset : offset + batch_size - len(indices)].tolist()
    return indices


@lru_cache(maxsize=8)  # a permutation of a large set takes longer than a step of a small model
def _epoch_order(length: int, epoch: int, seed: int, shares: int) -> Tensor:
    order = torch.randperm(length // shares, generator=seeded(seed, "epoch", epoch))
    return (order[:, None] * shares + torch.arange(shares)).flatten()
