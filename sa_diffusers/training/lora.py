"""Forget in a LoRA of the trained part: add it, read its weight changes, save it as diffusers does, fuse it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.merge_utils import ties
from safetensors.torch import load_file, save_file
from torch import nn

from sa_diffusers.core.objectives import LowRankChange
from sa_diffusers.core.safetensors_header import sort_metadata
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.model_names import folder_name


ADAPTER = "forget"  # the adapter's name in memory; in a file it has none
SECOND = "Already found a `peft_config`"  # peft's warning of a second adapter, as a chain has
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own default


def lora_file(concept: str) -> str:
    """The name of the file of an adapter that is of one concept among several."""
    return f"{folder_name(concept)}.safetensors"


def add_lora(module: nn.Module, layers: list[str], rank: int, alpha: float, seed: int) -> dict[str, LowRankChange]:
    """Add an adapter that changes nothing yet, alpha / rank * B @ A, and make it all that is trained.

    Returns:
        The change of each weight, by the weight's name before there was an adapter.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(derive_seed(seed, "lora"))  # peft draws A from the global generator
        warnings.filterwarnings("ignore", SECOND)
        module.add_adapter(config, ADAPTER)
    module.set_adapters(list(module.peft_config))  # beside it those of `load_adapters`, which stay as they are
    module.requires_grad_(False)
    changes = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            down, up = (part[ADAPTER] for part in (layer.lora_A, layer.lora_B))
            for matrix in (down, up):  # in at least float32 over weights of any precision: steps are small
                matrix.to(torch.promote_types(matrix.weight.dtype, torch.float32)).requires_grad_(True)
            names = tuple(f"{name}.{part}.{ADAPTER}.weight" for part in ("lora_A", "lora_B"))
            changes[f"{name}.weight"] = LowRankChange(down.weight, up.weight, layer.scaling[ADAPTER], names)
    return changes


def load_adapters(family: Family, files: Sequence[Path]) -> None:
    """Put saved adapters on the trained module, to stay as they are beside the one that is trained."""
    for number, file in enumerate(files, 1):
        named = {"prefix": family.component, "adapter_name": f"{ADAPTER}_{number}", "weight_name": file.name}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SECOND)
            family.module.load_lora_adapter(file.parent, **named)


class WithoutLora:
    """The module as it is without its adapters, to be called like it; shares the weights and takes no memory."""

    def __init__(self, module: nn.Module):
        self.module = module

    def attach(self, module: nn.Module) -> None:
        """Take the copy that is trained in the module's place (see `Objective.attach`)."""
        self.module = module

    def __call__(self, *arguments: Any, **conditions: Any) -> Any:
        layers = [layer for layer in self.module.modules() if isinstance(layer, BaseTunerLayer)]
        # The public switch also changes what requires a gradient, which FSDP2 takes for good at the first pass.
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            return self.module(*arguments, **conditions)
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled


def save_lora(family: Family, folder: Path, dtype: str) -> None:
    """Write the adapter as diffusers' `load_lora_weights` reads it, with its rank and alpha, atomically."""
    tensors = get_peft_model_state_dict(family.module, adapter_name=ADAPTER)
    tensors = {name: tensor.detach().to(getattr(torch, dtype)).contiguous() for name, tensor in tensors.items()}
    about = family.module.peft_config[ADAPTER].to_dict()
    about["target_modules"] = sorted(about["target_modules"])  # a set, in another order in every process
    with atomic_path(folder) as temporary:
        family.save_lora(temporary, tensors, about)
        sort_metadata(temporary / LORA_FILE)


def save_lora_for_others(family: Family, file: Path, alpha: float, path: Path) -> None:
    """Write an adapter that was saved once more, in float16 by the names that other programs read."""
    tensors = {name.removeprefix(f"{family.component}."): tensor for name, tensor in load_file(file).items()}
    with atomic_path(path) as temporary:
        save_file(family.lora_for_others(tensors, alpha), temporary)


@torch.no_grad()
def fuse_ties(module: nn.Module, density: float) -> None:
    """As `fuse_lora`, with what TIES (arXiv 2306.01708) makes of the adapters' changes, in the place of their sum.

    Args:
        density: share of each change that is kept, the largest of it, in (0, 1].
    """
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            changes = [layer.get_delta_weight(name) for name in layer.lora_A]
            weight = layer.get_base_layer().weight
            weight += ties(changes, torch.ones(len(changes), device=weight.device), density)
    module.unload_lora()


def fuse_lora(module: nn.Module) -> None:
    """Add the changes to the weights and take adapters away: the module is again what it was, but for its values."""
    module.fuse_lora(adapter_names=list(module.peft_config))
    module.unload_lora()
