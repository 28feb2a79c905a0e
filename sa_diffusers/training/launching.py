"""FSDP2 and DeepSpeed: what of `accelerate launch` training can honour, and what accelerate must be told besides."""

import os
import warnings

from accelerate import Accelerator
from accelerate.utils import is_deepspeed_available, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from sa_diffusers.io.processes import process_state
from sa_diffusers.models.precision import mixed_precision
from sa_diffusers.training.options import TrainingConfig


BUCKET_SIZE = 50_000_000  # weights whose gradients DeepSpeed sends at once; its own 500,000,000 would take 2 GB


def check_launch(config: TrainingConfig, shardable: bool = True) -> None:
    """Raise ValueError where `accelerate launch` was told of something that training cannot honour, or where a batch
    does not divide by its processes and their accumulation steps.

    A launcher that was asked for several processes and has started one, as it does on CPUs, is warned of.

    Args:
        shardable: whether the objective can do with weights in parts (see `Objective.attach`).
    """
    fsdp, deepspeed = (parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    name = "FSDP2" if fsdp else "DeepSpeed"
    # Of several processes accelerate says where they meet; how many run, only what starts them says.
    met = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if met and process_state().num_processes == 1:
        warnings.warn(
            "`accelerate launch` was asked for several processes and has started one, as it does with --cpu or one "
            "GPU: it does all the work. On CPUs `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 ...` starts two.",
            stacklevel=1,
        )
    count, parts = process_state().num_processes, config.gradient_accumulation_steps
    if config.train_batch_size % (count * parts):
        raise ValueError(
            f"train_batch_size {config.train_batch_size} does not divide by {count} processes x {parts} accumulation "
            f"steps; choose a multiple of {count * parts}"
        )
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("training is sharded by FSDP2 only; expected fsdp_version: 2 in accelerate's configuration")
    if deepspeed:
        _check_deepspeed(config)
    if (fsdp or deepspeed) and not shardable:
        raise ValueError(
            "quantised weights, projected gradients and forgetting in an encoder take weights that are whole on every "
            f"process; launch without {name}"
        )
    if (fsdp or deepspeed) and config.optimizer == "adamw_8bit":
        raise ValueError(f"adamw_8bit cannot update weights in parts; expected optimizer adamw under {name}")


def _check_deepspeed(config: TrainingConfig) -> None:
    if not is_deepspeed_available():
        raise ValueError(
            'DeepSpeed is not installed: pip install "sa_diffusers[deepspeed]", or launch with '
            "configs/accelerate/fsdp2.yaml, which saves more memory"
        )
    names = ("ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")
    given = {name.lower(): os.environ.get(f"ACCELERATE_DEEPSPEED_{name}") for name in names}
    allowed = {"zero_stage": (None, "1", "2"), "config_file": (None,)}
    refused = [f"{name} {value}" for name, value in given.items() if value not in allowed.get(name, (None, "none"))]
    if refused:
        raise ValueError(
            "expected DeepSpeed with zero_stage 1 or 2, nothing offloaded and no file of its own, as in "
            f"configs/accelerate/deepspeed.yaml, got {', '.join(refused)}; configs/accelerate/fsdp2.yaml also puts "
            "the weights in parts"
        )
    if mixed_precision(config.mixed_precision) == "fp16":
        raise ValueError("fp16 needs a gradient scaler, which is not used under DeepSpeed; expected bf16 or no")


def set_up_fsdp(accelerator: Accelerator, model: nn.Module) -> None:
    """What accelerate's configuration cannot say of FSDP2."""
    plugin = accelerator.state.fsdp_plugin
    if "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
        # Diffusers names blocks by class, of which accelerate would refuse those that a model happens to be without.
        classes = {type(module).__name__ for module in model.modules()}
        blocks = getattr(model, "_no_split_modules", None) or []
        plugin.transformer_cls_names_to_wrap = [name for name in blocks if name in classes]
    if accelerator.mixed_precision != "no":
        plugin.mixed_precision_policy = MixedPrecisionPolicy()  # none of its own: `autocasting` does as under DDP


def set_up_deepspeed(accelerator: Accelerator, config: TrainingConfig) -> None:
    """What the loop knows and DeepSpeed asks for. It is told of float32, since `autocasting` does as under DDP."""
    shares = accelerator.num_processes * config.gradient_accumulation_steps
    accelerator.deepspeed_plugin.deepspeed_config |= {  # which outlives a training: all of it is set again
        "train_batch_size": config.train_batch_size // config.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": config.train_batch_size // shares,
        "gradient_accumulation_steps": 1,  # the loop divides the loss, and says which part is the last
        "gradient_clipping": config.max_grad_norm or 0.0,
    }
    accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET_SIZE
