"""The attack with a gradient: search the decoder's inputs for an image that a reader takes for the class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sa_diffusers.io.processes import progress_bar
from studies.mnist.attacks.attempt import Attempt, Decoder, Reader, one_hot


ConditionMode = Literal["free", "simplex", "fixed"]


@dataclass(frozen=True)
class OptimisedAttempt(Attempt):
    """An attempt after its last step, and how it got there.

    Attributes:
        steps: optimiser steps taken when each of the S records was made; the first is 0.
        target_probability: P(target) by the reader that was climbed, [S, B]. It says little about the image: any
            reader has inputs that fool it. `recovered` asks others.
        frames: images [S, B, C, H, W] in [0, 1]; the last are `images`.
    """

    steps: tuple[int, ...]
    target_probability: Tensor
    frames: Tensor


def optimise_input(
    decode: Decoder,
    classify: Reader,
    target: int,
    start_latents: Tensor,
    start_condition: Tensor,
    condition_mode: ConditionMode = "simplex",
    *,
    steps: int = 1000,
    learning_rate: float = 0.1,
    keep_every: int = 100,
    description: str = "optimise input",
) -> OptimisedAttempt:
    """Minimise -log P(target | decode(z, c)) over z and c with Adam, from B starts at once.

    The starts do not touch each other: the loss is their sum and Adam works on each number by itself. No regulariser
    holds z near the prior. The weights behind both callables get no gradient, and nothing about them is changed.

    Args:
        target: index of the class, the reader's and (for "fixed") the condition's.
        start_latents: z [B, L].
        start_condition: [B, K]. "free": c itself, any real numbers. "simplex": its logits, c = softmax of them, so
            that a one-hot row starts nearly flat. "fixed": c is the one-hot row of `target` throughout, and this gives
            its shape only; so the three modes can be compared from one start.
        keep_every: record every so many steps, and the last one.
    """
    latents, weights = start_latents.detach().clone(), start_condition.detach().clone()
    if condition_mode == "fixed":
        weights = one_hot(torch.full((len(weights),), target), weights.shape[1]).to(weights)
    moving = [latents] + [weights] * (condition_mode != "fixed")
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in moving], lr=learning_rate)
    records = []
    with torch.enable_grad():  # whatever the caller's setting is
        for step in progress_bar(range(steps + 1), description, "steps"):
            condition = weights.softmax(1) if condition_mode == "simplex" else weights
            images = decode(latents, condition)
            log_probability = classify(images).log_softmax(1)[:, target]
            if step % keep_every == 0 or step == steps:  # a decoder may hand back z itself, which moves on
                records.append((step, log_probability.detach().exp(), images.detach().clone()))
            if step < steps:
                _set_gradients(moving, -log_probability.sum())
                optimizer.step()
    kept, probabilities, frames = zip(*records, strict=True)
    latents, condition = latents.detach(), condition.detach()
    return OptimisedAttempt(frames[-1], latents, condition, kept, torch.stack(probabilities), torch.stack(frames))


def _set_gradients(moving: Sequence[Tensor], loss: Tensor) -> None:
    """By autograd.grad, since backward() would leave gradients in the weights of both models; 0 for what is unused."""
    for tensor, gradient in zip(moving, torch.autograd.grad(loss, moving, materialize_grads=True), strict=True):
        tensor.grad = gradient
