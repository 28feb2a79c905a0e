"""Processes that train in parts on CPUs; as a program, one of those of scripts/forget.py under FSDP2."""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def launch_environment(way: str, **options: str) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/<way>.yaml` hands to its processes."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    config = str(CONFIGS / f"{way}.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", config, *arguments, "scripts/forget.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    assert (parsed.use_fsdp, parsed.use_deepspeed) == (way == "fsdp2", way == "deepspeed")
    parsed.deepspeed_fields_from_accelerate_config = ""  # which the launcher fills in where it has found devices
    return prepare_multi_gpu_env(parsed) if way == "fsdp2" else prepare_deepspeed_cmd_env(parsed)[1]


def on_cpus(way: str) -> None:
    """Accelerate offers both to processes with accelerators only; on CPUs they work once it is told of some."""
    PartialState(cpu=True)
    kind = DistributedType.DEEPSPEED if way == "deepspeed" else DistributedType.MULTI_GPU
    PartialState._shared_state["distributed_type"] = kind


if __name__ == "__main__":
    from sa_diffusers.cli.forget import main

    on_cpus("fsdp2")
    main(sys.argv[1:])
