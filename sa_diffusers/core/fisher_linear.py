"""The exact Fisher of models made of linear layers, many samples at a time.

A layer y = W x + b that is called once, on one row a sample, has the per-sample gradients dL/dW = g x^T and dL/db = g,
where g is the gradient of that sample's loss with respect to y. Their squares, summed over samples, are two matrix
products (Goodfellow 2015, "Efficient per-example gradient computations"):

    sum_n (g_n x_n^T)^2 = (G^2)^T (X^2)   and   sum_n g_n^2,   with the rows g_n of G [B, out] and x_n of X [B, in].

So one forward and one backward pass serve a whole batch, and no gradient of a single sample is ever formed.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sa_diffusers.core.batches import Batch, take, to
from sa_diffusers.core.fisher import FisherSums
from sa_diffusers.core.losses import Loss
from sa_diffusers.core.seeding import seeded


def is_linear(model: nn.Module, loss: Loss) -> bool:
    """Whether `estimate_linear_fisher` applies: a loss of one term, every parameter in one nn.Linear (no subclass)."""
    owned = [id(p) for layer in _linear_layers(model).values() for p in layer.parameters()]
    return loss.num_terms == 1 and sorted(owned) == sorted(id(p) for p in model.parameters())


def estimate_linear_fisher(
    model: nn.Module,
    loss: Loss,
    sample: Callable[[list[int]], Batch],
    indices: Iterable[int],
    *,
    batch_size: int = 512,
    seed: int = 0,
    sums: FisherSums | None = None,
) -> FisherSums:
    """What `estimate_fisher` gives with all terms and every parameter of the model, up to rounding.

    Args:
        model: `is_linear`, in eval mode; each layer is called at most once, and its weights are used nowhere else.
        sample: the batch of some samples, as a function of their indices.
        batch_size: samples in one forward pass; changes memory and speed, not the result.
        seed, sums: as of `estimate_fisher`.

    Raises:
        ValueError: the model or the loss is of another kind, a layer is called twice, or its input is not [B, in].
        FloatingPointError: a gradient is not finite; its batch is not added.
    """
    if not is_linear(model, loss):
        raise ValueError("expected parameters of nn.Linear layers alone and a loss of one term; use estimate_fisher")
    sums = sums or FisherSums.zeros(dict(model.named_parameters()))
    sums.ratio = 1.0
    device = next(model.parameters()).device
    indices = list(indices)
    for start in range(0, len(indices), batch_size):
        block = indices[start : start + batch_size]
        batch = sample(block)
        noise = _noise(loss, batch, block, seed).to(device)
        _add_block(sums, block, _inputs_and_gradients(model, loss, to(batch, device), noise))
    return sums


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _noise(loss: Loss, batch: Batch, indices: list[int], seed: int) -> Tensor:
    """The noise of each sample from its own generator, as if it were alone: [B, ...]."""
    noise = []
    for row, index in enumerate(indices):
        generator = seeded(seed, "fisher", index, 0)
        torch.rand(1, generator=generator, dtype=torch.float64)  # the term, which `stratified_terms` draws first
        noise.append(loss.sample_noise(take(batch, slice(row, row + 1)), generator))
    return torch.cat(noise)


def _inputs_and_gradients(
    model: nn.Module, loss: Loss, batch: Batch, noise: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each parameter X and G, whose squares make its Fisher; a bias is the weight of an input that is 1, [B, 1]."""
    calls: dict[str, tuple[Tensor, GradientEdge]] = {}

    def remember(name: str, layer: nn.Linear, inputs: Tensor, outputs: Tensor) -> None:
        if name in calls:
            raise ValueError(f"expected every layer to be called once, {name} is called again; use estimate_fisher")
        if inputs.dim() != 2 or len(inputs) != len(noise):
            shapes = f"[{len(noise)}, in], a row a sample; {name} is given {list(inputs.shape)}"
            raise ValueError(f"expected inputs {shapes}; use estimate_fisher")
        # The edge and not the tensor, which may be changed in place by what follows, such as nn.ReLU(inplace=True).
        calls[name] = (inputs.detach(), get_gradient_edge(outputs))

    layers = _linear_layers(model)
    hooks = [
        layer.register_forward_hook(lambda layer, args, outputs, name=name: remember(name, layer, *args, outputs))
        for name, layer in layers.items()
    ]
    try:
        values = loss(model, batch, torch.zeros(len(noise), dtype=torch.long, device=noise.device), noise)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(values.sum(), [edge for _, edge in calls.values()], allow_unused=True)
    found = {}
    for (name, (inputs, _)), gradient in zip(calls.items(), gradients, strict=True):
        if gradient is None:  # the loss does not depend on this layer
            continue
        found[f"{name}.weight"] = inputs, gradient
        if layers[name].bias is not None:
            found[f"{name}.bias"] = torch.ones_like(inputs[:, :1]), gradient
    return found


def _add_block(sums: FisherSums, indices: list[int], found: dict[str, tuple[Tensor, Tensor]]) -> None:
    squares = {name: (inputs.square(), gradient.square()) for name, (inputs, gradient) in found.items()}
    # |g x^T|^2 = |g|^2 |x|^2, one number a sample and parameter.
    totals = {name: math.prod(part.sum(1, dtype=torch.float64) for part in pair) for name, pair in squares.items()}
    per_sample = sum(totals.values()).tolist()
    for index, total in zip(indices, per_sample, strict=True):
        if not math.isfinite(total):
            raise FloatingPointError(f"the gradient of sample {index} is not finite; use float32, or look at it")
    for name, (inputs, gradient) in squares.items():
        sums.square[name] += (gradient.T @ inputs).view_as(sums.square[name])
        total = totals[name].sum().item()
        sums.totals[name] = (sums.totals[name][0] + total, sums.totals[name][1] + total)
    sums.unbiased.update(zip(indices, per_sample, strict=True))
