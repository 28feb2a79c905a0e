"""What the training loop steps: the weights, whole or in parts, with their optimiser, schedule and moving average."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sa_diffusers.core.sharding import local_part, part_like, whole_like
from sa_diffusers.models.precision import autocasting, compute_dtype
from sa_diffusers.training.launching import set_up_deepspeed, set_up_fsdp
from sa_diffusers.training.options import TrainingConfig


MAX_SKIPPED = 20  # a gradient scaler skips a step now and then; this many in a row mean that it finds no scale


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite."""


class Optimisation:
    """The weights of a module that require gradients, and all that a step changes.

    On one process, or several that repeat each other (DDP), the module's own weights are stepped. FSDP2 and DeepSpeed
    would change the module for good, so they get a copy of it, and the module itself waits in main memory. It gets the
    weights back, whole and on every process, within `shown` and at the end.

    Attributes:
        prepared: what the objective calls.
        parameters: those that are stepped, by their names in the module; under FSDP2 in parts (see `sharding`).
        copied: whether they are a copy's.
        engine: DeepSpeed's, or None. It exchanges gradients within backward, and clips them where it steps.
        average: the weights' moving average, or None.
        stateful: what of it a checkpoint must hold besides model and optimiser.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, config: TrainingConfig):
        self.accelerator, self.model, self.config = accelerator, model, config
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.copied = accelerator.is_fsdp2 or deepspeed
        self._module = copy.deepcopy(model.to("cpu")) if self.copied else model
        if config.gradient_checkpointing:
            self._module.enable_gradient_checkpointing()
        optimizer = _optimizer([p for p in self._module.parameters() if p.requires_grad], config)
        # Not prepared: it steps once an optimiser step, where a prepared schedule would step once a process.
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=config.lr_step_rules,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.num_train_steps,
        )
        if accelerator.is_fsdp2:
            set_up_fsdp(accelerator, model)
        if deepspeed:
            set_up_deepspeed(accelerator, config)
        self.prepared, self.optimizer = accelerator.prepare(self._module, optimizer)
        self.engine = self.prepared if deepspeed else None
        dtype = compute_dtype(config.mixed_precision)
        if self.copied:  # only now: its weights' way into parts may be by a state dict
            self._module.register_state_dict_post_hook(_without_frozen)
            self._module.register_load_state_dict_post_hook(_expecting_no_frozen)
        if self.copied and dtype is not None:
            self._module.forward = autocasting(self._module, dtype, accelerator.device)
        self.parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        averaged = config.ema_decay is not None
        self.average = Average(list(self.parameters.values()), config) if averaged else None
        self.stateful = [part for part in (self.scheduler, self.average) if part is not None]
        self._skipped = 0

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward pass of a part of the batch: processes exchange gradients with the last only."""
        if self.engine is not None:  # ZeRO-2 adds up every part's in the processes that keep them
            self.engine.set_gradient_accumulation_boundary(last)
        with nullcontext() if last or self.engine is not None else self.accelerator.no_sync(self.prepared):
            yield

    def backward(self, loss: Tensor, last: bool, add_gradient: Callable[[], None]) -> None:
        """Add the gradient of a part of the batch; with the last, by `add_gradient`, that of terms of the weights."""
        if self.engine is None:
            self.accelerator.backward(loss)
            if last and self.accelerator.scaler is not None:
                self.accelerator.unscale_gradients(self.optimizer)
            if last:
                add_gradient()
            return
        if last:
            # After backward, gradients are where only the engine finds them. It takes their mean over processes: of
            # what is the same on all, that is it itself, up to rounding.
            add_gradient()
        self.engine.backward(loss)  # accelerate's own would also step

    def clip(self) -> Tensor:
        """Clip the gradient, of all weights and processes together; returns its norm before that, a scalar."""
        if self.engine is not None:
            return self.engine.optimizer.scaled_global_norm()  # infinite where it is not finite
        parameters = list(self.parameters.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm or math.inf, norm)
        return norm

    def step(self) -> None:
        """Step optimiser, schedule and average. Raises TrainingDiverged: float16 overflowed too often in a row."""
        (self.optimizer if self.engine is None else self.engine).step()
        skipped = self.accelerator.optimizer_step_was_skipped
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped == MAX_SKIPPED:
            raise TrainingDiverged(f"{MAX_SKIPPED} steps in a row overflowed in float16; use bf16")
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.average is not None and not skipped:  # else the average would count the same weights twice
            self.average.step()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the caller's module has the weights that would be saved, in eval mode. All must call."""
        if self.average is not None:
            self.average.swap_in()
        if self.copied:
            self._gather()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            if self.copied:
                self.model.to("cpu")
            if self.average is not None:
                self.average.swap_out()

    def finish(self) -> None:
        """Leave the caller's module as an ordinary one, with the weights to be saved, in eval mode."""
        if self.average is not None:
            self.average.copy_to()
        if self.copied:
            self._gather()
        else:
            # Else the model would autocast for good.
            self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)
            if self.config.gradient_checkpointing:
                self.model.disable_gradient_checkpointing()
        self.model.eval()

    def close(self) -> None:
        """Let go of the copy; for after `finish`, or after an exception in its place."""
        if self.engine is not None:
            self.engine.destroy()  # else its hooks would hold the copy and its buffers for good

    @torch.no_grad()
    def _gather(self) -> None:
        """Copy what has changed, whole, into the caller's module, one tensor after the other."""
        targets = self.model.to(self.accelerator.device).state_dict()
        for name, value in self._module.state_dict().items():
            targets[name].copy_(whole_like(local_part(value), value))


class Average:
    """The moving average of weights by diffusers' `EMAModel`, each process averaging the parts that it holds.

    Its state dict holds whole tensors, however the weights are spread; every process must call for it.
    """

    def __init__(self, parameters: list[Tensor], config: TrainingConfig):
        self.parameters, decay = parameters, config.ema_decay
        constant = {} if config.ema_warmup else {"min_decay": decay, "update_after_step": -1}  # else the first has 0
        self.ema = EMAModel(self._parts(), decay=decay, **constant)

    def _parts(self) -> list[Tensor]:
        return [local_part(parameter) for parameter in self.parameters]

    def step(self) -> None:
        self.ema.step(self._parts())

    def copy_to(self) -> None:
        self.ema.copy_to(self._parts())

    def swap_in(self) -> None:
        """Overwrite the weights until `swap_out`."""
        self.ema.store(self._parts())
        self.copy_to()

    def swap_out(self) -> None:
        self.ema.restore(self._parts())

    def state_dict(self) -> dict:
        shadows = zip(self.ema.shadow_params, self.parameters, strict=True)
        return self.ema.state_dict() | {"shadow_params": [whole_like(s, p) for s, p in shadows]}

    def load_state_dict(self, state: dict) -> None:
        shadows = zip(state["shadow_params"], self.parameters, strict=True)
        self.ema.load_state_dict(state | {"shadow_params": [part_like(s, p).clone() for s, p in shadows]})
        self.ema.to(local_part(self.parameters[0]).device)


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _without_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: dict) -> None:
    """Leave out what nothing trains: the caller's module has it, and a checkpoint needs none of it."""
    for name in _frozen(module):
        del state[prefix + name]


def _expecting_no_frozen(module: nn.Module, keys: Any) -> None:
    frozen = _frozen(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    from bitsandbytes.optim import AdamW8bit  # an extra; importing it takes seconds

    return AdamW8bit(parameters, **options)
