"""The linear layers of a frozen module in 8 or 4 bits by bitsandbytes, while their originals wait in main memory."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


ORIGINAL = "_sa_diffusers_original"  # of a layer of few bits: the layer that it stands for, in a tuple, unregistered


def quantize(module: nn.Module, bits: int) -> None:
    """Have layers of few bits stand for the linear ones, in place; a move to a device quantises them.

    Args:
        bits: 8, by LLM.int8 (Dettmers et al. 2022), or 4, as NormalFloat in blocks of 64 (Dettmers et al. 2023).
    """
    import bitsandbytes  # an extra; importing it takes seconds

    for name, linear in [(n, layer) for n, layer in module.named_modules() if type(layer) is nn.Linear]:
        size, biased = (linear.in_features, linear.out_features), linear.bias is not None
        if bits == 4:
            layer = bitsandbytes.nn.Linear4bit(*size, biased, quant_type="nf4", device="meta")
            layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            layer = bitsandbytes.nn.Linear8bitLt(*size, biased, has_fp16_weights=False, device="meta")
            layer.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False)
        layer.bias = linear.bias
        home = linear.weight.device
        setattr(layer, ORIGINAL, (linear.to("cpu"),))
        module.set_submodule(name, layer.to(home).train(linear.training))


def originals(module: nn.Module) -> dict[str, nn.Linear]:
    """What layers of few bits stand for, by their names in the module."""
    return {name: vars(part)[ORIGINAL][0] for name, part in module.named_modules() if ORIGINAL in vars(part)}


def original_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict as it was before it was quantised."""
    found, state = originals(module), module.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not any(name.startswith(f"{layer}.") for layer in found)}
    return kept | {
        f"{name}.{part}": tensor for name, one in found.items() for part, tensor in one.state_dict().items()
    }


@contextmanager
def quantized(module: nn.Module, bits: int | None) -> Iterator[None]:
    """Within the block the module is quantised, afterwards it is what it was, or what `unquantized` made of it."""
    if bits is None:
        yield
        return
    quantize(module, bits)
    try:
        yield
    finally:
        _restore(module)


@contextmanager
def unquantized(module: nn.Module, bits: int | None) -> Iterator[None]:
    """Within the block a quantised module is in main memory as it was, to be changed and saved."""
    if bits is None:
        yield
        return
    home = next(module.parameters()).device
    _restore(module.to("cpu"))
    try:
        yield
    finally:
        quantize(module, bits)
        module.to(home)


def _restore(module: nn.Module) -> None:
    device = next(module.parameters()).device
    for name, linear in originals(module).items():
        module.set_submodule(name, linear.to(device))


@contextmanager
def gradients_of(module: nn.Module, names: Iterable[str] | None, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Within the block what stands for weights of the module in `torch.autograd.grad`, by name; None: for all.

    A weight W of few bits takes no gradient. The change that is added to its layer's result, x D^T with D = 0, takes
    the same one, and being one number that is expanded it takes no memory.

    Args:
        dtype: that the module computes in.
    """
    found, layers = dict(module.named_parameters()), originals(module)
    names = list(found) if names is None else list(names)
    with ExitStack() as hooks:
        for name in [name for name in names if name.rpartition(".")[0] in layers and name.endswith(".weight")]:
            shape, layer = layers[name.rpartition(".")[0]].weight.shape, module.get_submodule(name.rpartition(".")[0])
            change = torch.zeros(1, dtype=dtype, device=found[name].device).expand(shape).requires_grad_()
            hook = layer.register_forward_hook(
                lambda _, inputs, output, change=change: output + functional.linear(inputs[0].to(change.dtype), change)
            )
            hooks.callback(hook.remove)
            found[name] = change
        yield {name: found[name].requires_grad_(True) for name in names}
