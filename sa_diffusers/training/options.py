"""Settings of an optimisation, checked before anything starts."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from sa_diffusers.io.configuration import Options, option


@dataclass
class TrainingConfig(Options):
    """Settings of one optimisation. The learning rate is used as written, whatever the number of processes.

    Raises:
        ValueError: a number out of its range; step rules without their schedule, the schedule without step rules, or
            rules of another form; an optimiser whose package is not installed.
    """

    num_train_steps: int = option(1000, "Optimiser steps.", above=0)
    train_batch_size: int = option(
        8, "Samples of each kind in an optimiser step, shared by all processes and accumulation steps.", above=0
    )
    learning_rate: float = option(1e-5, "Peak learning rate; never scaled silently.", above=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "piecewise_constant"] = option(
        "constant_with_warmup", "Schedule, by diffusers' name."
    )
    lr_warmup_steps: int = option(
        0, "Optimiser steps of linear warm-up; constant and piecewise_constant have none.", least=0
    )
    lr_step_rules: str | None = option(
        None,
        "For piecewise_constant: factors of the learning rate, each with the step before which it holds, "
        "and the last one alone. 1:1000,0.1:2000,0.01 is 1 for 1000 steps, 0.1 up to step 2000, then 0.01.",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = option(
        "adamw", "adamw_8bit: AdamW's averages in 8 bits, a quarter of the memory; needs the extra 8bit."
    )
    adam_beta1: float = option(0.9, "AdamW's first decay rate.", least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's second decay rate.", least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", least=0)
    weight_decay: float = option(
        0.0, "AdamW's weight decay. It pulls to 0, not to the anchor; with adapters these are one.", least=0
    )
    max_grad_norm: float | None = option(1.0, "Clip the gradient to this norm; null: off.", above=0)
    gradient_accumulation_steps: int = option(
        1, "Parts into which each process cuts its share of a batch to save memory.", above=0, identity=False
    )
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.", identity=False)
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        None,
        "no, fp16, bf16, or auto: bf16 where the device is made for it; null: what `accelerate config` or `accelerate "
        "launch` says.",
    )
    ema_decay: float | None = option(
        None, "Decay of the weight average that is saved, at most; null: off.", least=0, below=1
    )
    ema_warmup: bool = option(
        True,
        "Let the decay rise: 0 at the first step, n / (9 + n) at step n, up to ema_decay. False is the authors': "
        "ema_decay from the first step, so that ema_decay ** n of the average after n is what training started at.",
    )
    checkpointing_steps: int | None = option(100, "Save a checkpoint every so many steps.", above=0, identity=False)
    checkpoints_total_limit: int = option(2, "Checkpoints kept, the newest.", above=0, identity=False)
    logging_steps: int = option(5, "Record losses every so many steps.", above=0, identity=False)
    report_to: str | None = option(None, "Tracker: tensorboard, wandb, ...; null: off.", identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError(
                f"lr_scheduler piecewise_constant and lr_step_rules need each other, got {self.lr_scheduler} and "
                f"{self.lr_step_rules!r}; set both or neither"
            )
        number = r"[0-9]*\.?[0-9]+(e-?[0-9]+)?"
        if self.lr_step_rules is not None and not re.fullmatch(rf"({number}:[0-9]+,)*{number}", self.lr_step_rules):
            raise ValueError(f"expected lr_step_rules such as 1:1000,0.1:2000,0.01, got {self.lr_step_rules!r}")
        if self.ema_decay is None and not self.ema_warmup:
            raise ValueError(
                "ema_warmup false is of a weight average: expected an ema_decay, such as 0.9999, got none"
            )
        if self.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise ValueError(
                "optimizer adamw_8bit needs bitsandbytes, which is not installed; run "
                'pip install "sa_diffusers[8bit]", or pass optimizer adamw'
            )


@dataclass
class PerformanceOptions(Options):
    """Speed and memory. mixed_precision, gradient_checkpointing and optimizer stand with those of training."""

    compile_backend: str | None = option(
        None, "Compile the trained module by this backend of torch.compile (inductor); null: off.", identity=False
    )
    channels_last: bool = option(
        False, "Keep its weights in the memory format that convolutions on GPUs like best.", identity=False
    )
    offload: bool = option(
        True, "On a GPU, keep text encoder and VAE in main memory while nothing is encoded or decoded.", identity=False
    )
    quantize_base: int | None = option(
        None,
        "Keep the linear layers under a LoRA in so many bits, 8 or 4 (needs the extra 8bit), until the change is "
        "added to the whole ones; null: off.",
        least=4,
    )
