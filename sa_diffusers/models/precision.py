"""Where and in which precision a model computes. Its weights keep their precision, and what it returns is float32."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from sa_diffusers.io.processes import process_state


KEPT = "_sa_diffusers_autocast"


def mixed_precision(given: str | None) -> str:
    """ "no", "fp16" or "bf16": as given, for "auto" what this device is made for, for None what `accelerate launch`
    says, by default "no"."""
    if given == "auto":
        return "bf16" if computes_in_bfloat16() else "no"
    return given or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def computes_in_bfloat16() -> bool:
    """Whether the device has instructions of its own for it: emulated, it is slower than float32, up to 17 times."""
    if process_state().device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return process_state().device.type == "cpu" and any(found.get(f"{kind}_bf16") for kind in ("avx512", "amx"))


def compute_dtype(given: str | None) -> torch.dtype | None:
    """The dtype of autocast for what `mixed_precision` takes; None for float32."""
    return {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision(given)]


def autocasting(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable:
    """The module's forward pass, autocast to `dtype`, with float32 results."""
    # Without the cache of cast weights: what is cast while no gradient is taken would be reused where one is, and
    # FSDP2 gathers weights anew into the same tensors.
    return convert_outputs_to_fp32(torch.autocast(device.type, dtype, cache_enabled=False)(module.forward))


def _kept(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable:
    """`autocasting` of the module's own forward pass, the same function each time: for another one torch.compile would
    compile anew, and give up after eight."""
    found = (id(module), module.forward, dtype, device)  # a copy of the module takes along what the original kept
    if module.__dict__.get(KEPT, (None, None))[0] != found:
        module.__dict__[KEPT] = (found, autocasting(module, dtype, device))
    return module.__dict__[KEPT][1]


def release(module: nn.Module) -> None:
    """Drop what `autocast_forward` kept, by which a module holds itself and outlives those who use it."""
    module.__dict__.pop(KEPT, None)


@contextmanager
def autocast_forward(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block, forward passes of the module autocast to `dtype`, as those of training do; None: as usual.

    Do not copy the module in the block: the copy would run the original's weights.
    """
    if dtype is None:
        yield
        return
    before = module.__dict__.get("forward")
    module.forward = _kept(module, dtype, next(module.parameters()).device)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@contextmanager
def usual_modes() -> Iterator[None]:
    """Within the block PyTorch computes as it does when it has been imported: with gradients, no autocast, in float32
    and on the CPU where nothing else is said. Whatever the caller has set is set again afterwards."""
    before = torch.get_default_dtype()
    with ExitStack() as modes:
        modes.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float32)
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


@contextmanager
def kept_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the modules do not drop; afterwards they train, and take gradients, where they did before."""
    modules = list(modules)
    gradients = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    training = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for parameter, required in gradients:
            if parameter.requires_grad != required:  # tensors made in inference mode refuse even what they have
                parameter.requires_grad_(required)
        for part, trains in training:
            part.training = trains


def weights_in_main_memory(module: nn.Module) -> dict[str, Tensor]:
    """A copy of them."""
    return {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}


@contextmanager
def kept_weights(module: nn.Module) -> Iterator[None]:
    """After the block the module's weights are what they were before."""
    kept = weights_in_main_memory(module)
    try:
        yield
    finally:
        if getattr(module, "peft_config", None):  # of a training that was stopped
            module.unload_lora()
        module.load_state_dict(kept)


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The module on `device` within the block, and afterwards where it was."""
    home = next(module.parameters()).device
    if home == device:  # moving nothing still visits every tensor
        yield module
        return
    try:
        yield module.to(device)
    finally:
        module.to(home)


@contextmanager
def in_precision(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the module is of this dtype, which holds what its own does."""
    before = module.dtype
    try:
        module.to(dtype)
        yield
    finally:
        module.to(before)


@contextmanager
def in_main_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the modules off their device within the block; `on_device` brings each back while it works."""
    with ExitStack() as homes:
        for module in modules:
            homes.enter_context(on_device(module, torch.device("cpu")))
        yield
