"""A caller's modules as they were loaded: what wraps them is taken off, what would be trained with them is refused."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel


PARALLEL = (nn.DataParallel, DistributedDataParallel)
TRAINABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def unwrapped(part: Any) -> Any:
    """A part of a pipeline without torch.compile, DataParallel or DDP around it."""
    while hasattr(part, "_orig_mod") or isinstance(part, PARALLEL):
        part = part._orig_mod if hasattr(part, "_orig_mod") else part.module
    return part


def unfused(module: nn.Module) -> nn.Module:
    """The module without the joint projections of `fuse_qkv_projections`, in place: those that they copy stay."""
    fused = [layer for layer in module.modules() if getattr(layer, "fused_projections", False)]
    if any("Fused" in type(layer.processor).__name__ for layer in fused):  # else it was called, and leaves the layers
        module.unfuse_qkv_projections()
    for layer in fused:
        layer.fused_projections = False
        for name in ("to_qkv", "to_kv", "to_added_qkv"):
            if hasattr(layer, name):
                delattr(layer, name)
    return module


def take_over(module: nn.Module, source: nn.Module) -> None:
    """Give a module the values of a plain one, and joint projections made of them where it had such."""
    module.load_state_dict(source.state_dict(), strict=False)
    for layer in module.modules():
        if getattr(layer, "fused_projections", False):
            layer.fuse_projections()


def check_plain(parts: Mapping[str, Any], trained: str) -> None:
    """Raise ValueError for the first part of a pipeline that is not as it was loaded.

    Args:
        parts: the pipeline's components, unwrapped.
        trained: the name of the one that is trained.
    """
    for name, part in parts.items():
        for fault in _faults(part, name == trained) if isinstance(part, nn.Module) else ():
            raise ValueError(f"the pipeline's {name} {fault}")


def _faults(module: nn.Module, trained: bool) -> Iterator[str]:
    for name, layer in module.named_modules():
        where = f" ({name})" if name else ""
        if hasattr(layer, "_orig_mod"):
            yield f"is compiled in parts{where}; compile the whole of it, or the forgotten pipeline"
        if isinstance(layer, BaseTunerLayer):
            unload = "pipeline.fuse_lora(), then pipeline.unload_lora_weights()"
            yield f"has adapters loaded; fuse or unload them first ({unload})"
        if hasattr(layer, "_hf_hook"):
            yield f"has hooks of accelerate{where}, such as offloading's; call pipeline.remove_all_hooks() first"
        if getattr(layer, "_diffusers_hook", None) is not None and layer._diffusers_hook.hooks:
            hooks = ", ".join(layer._diffusers_hook.hooks)
            yield f"has hooks of diffusers{where}: {hooks}; load the pipeline anew, without them"
        own = layer.__dict__.get("forward")
        stock = type(layer).forward
        if own is not None and getattr(own, "__func__", None) not in (stock, inspect.unwrap(stock)):
            yield f"has another forward pass{where} than its class; load the pipeline anew, without it"
        if getattr(layer, "s1", None) is not None:
            yield f"has FreeU{where}; call pipeline.disable_freeu() first, and enable it on the forgotten one"
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        if weight.is_meta:
            yield f"has no values in {name}, which is on the meta device; load the pipeline without a device map"
        if trained and isinstance(weight, nn.Parameter) and weight.dtype not in TRAINABLE:
            kind = str(weight.dtype).removeprefix("torch.")
            yield f"has {name} in {kind}; load the pipeline in float32, float16 or bfloat16"
        if weight.dtype in TRAINABLE and not torch.isfinite(weight.detach()).all():
            yield f"has NaN or infinite values in {name}; take files that are whole, or a precision that holds them"
