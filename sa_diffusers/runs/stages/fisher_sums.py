"""Estimate the Fisher's sums over a sample set: shared by processes, saved now and then, resumed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.fisher import FisherSums, estimate_fisher, merge
from sa_diffusers.core.fisher_linear import estimate_linear_fisher, is_linear
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import Family
from sa_diffusers.io.atomic_files import explain_read_errors, load_tensors, save_tensors
from sa_diffusers.io.processes import process_state, progress_bar
from sa_diffusers.models.precision import autocast_forward, free_memory
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.runs.paper_quirks import FisherLabelDropout, quirky_fisher_batch


FISHER_SAVES = 10  # times that a long estimation saves its state
ROOM = {True: 0.6, False: 0.4}  # of the free memory, with and without checkpointing; the rest is for activations


def estimate_sums(family: Family, options: RunOptions, samples: SampleSet, count: int, parts_dir: Path) -> FisherSums:
    """This process's share of the samples, saved now and then; then the sums of all processes."""
    state = process_state()
    own_path = parts_dir / f"{state.process_index}_of_{state.num_processes}.safetensors"
    parameters = dict(family.module.named_parameters())
    device = sums_device(family, options)
    sums = _load_sums(own_path, device) if own_path.exists() else FisherSums.zeros(parameters, device)
    mine = [index for index in range(state.process_index, count, state.num_processes)]
    left = [index for index in mine if index not in sums.unbiased]
    block = max(1, -(-len(mine) // FISHER_SAVES))
    progress = progress_bar(total=len(mine), initial=len(mine) - len(left), desc="fisher")
    with _differentiable(family, options.gradient_checkpointing):
        for start in range(0, max(len(left), 1), block):  # once at least: a process without samples adds zeros
            _add(family, options, samples, left[start : start + block], sums, progress)
            _save_sums(sums, own_path)
    progress.close()
    if state.num_processes == 1:
        return sums
    del sums  # there may be no room for all processes' at once
    state.wait_for_everyone()
    names = [f"{rank}_of_{state.num_processes}.safetensors" for rank in range(state.num_processes)]
    return merge(_load_sums(parts_dir / name, device) for name in names)


@contextmanager
def _differentiable(family: Family, checkpointing: bool) -> Iterator[None]:
    """The module as the estimator needs it, for a while: every weight's gradient, activations recomputed if asked."""
    family.module.eval().requires_grad_(True)
    if checkpointing:
        family.module.enable_gradient_checkpointing()
    try:
        with autocast_forward(family.module, family.compute_dtype):
            yield
    finally:
        if checkpointing:
            family.module.disable_gradient_checkpointing()


def _add(
    family: Family, options: RunOptions, samples: SampleSet, indices: list[int], sums: FisherSums, progress: tqdm
) -> None:
    """Add the squared gradients of some samples to the sums."""
    loss, quirks, seed = family.loss, options.paper_quirks, derive_seed(options.seed, "fisher")
    if "fisher_label_dropout" in quirks:
        loss = FisherLabelDropout(loss, family.pipeline.null_class)

    def batch(chosen: list[int]) -> Batch:
        part = samples.take(chosen)
        found = family.batch(part.latents, part.conditions)
        return quirky_fisher_batch(found, quirks, loss.num_terms, chosen[0], seed) if quirks else found

    if is_linear(family.module, family.loss):
        estimate_linear_fisher(family.module, family.loss, batch, indices, seed=seed, sums=sums)
        progress.update(len(indices))
        return
    for index in indices:
        estimate_fisher(
            family.module,
            loss,
            dict(family.module.named_parameters()),
            lambda i: batch([i]),
            [index],
            terms=None if family.loss.num_terms == 1 else options.terms,  # of one term there is no choice
            chunk_size=options.fisher_chunk_size,
            loss_scale=float16_scale(family) if family.compute_dtype == torch.float16 else None,
            seed=seed,
            sums=sums,
        )
        progress.update()


def float16_scale(family: Family) -> float:
    """Makes the gradient that of a sum over data, which float16 holds, whether the loss is a sum or a mean."""
    return float(math.prod(family.latent_shape)) if family.loss.reduction == "mean" else 1.0


def sums_device(family: Family, options: RunOptions) -> torch.device:
    """Where the sums are kept: with the weights, unless they and the gradients of two draws do not fit there."""
    device = family.device
    if options.fisher_device == "auto" and device.type == "cuda":
        needed = 3 * 4 * sum(p.numel() for p in family.module.parameters())
        room = ROOM[options.gradient_checkpointing] * free_memory(device)
        return device if needed < room else torch.device("cpu")
    return torch.device("cpu") if options.fisher_device == "cpu" else device


def _save_sums(sums: FisherSums, path: Path) -> None:
    rest = {"totals": sums.totals, "unbiased": list(sums.unbiased.items()), "ratio": sums.ratio}
    save_tensors({name: tensor.cpu() for name, tensor in sums.square.items()}, path, rest=rest)


def _load_sums(path: Path, device: torch.device) -> FisherSums:
    tensors, notes = load_tensors(path)
    with explain_read_errors(path):
        square, rest = {name: tensor.to(device) for name, tensor in tensors.items()}, notes["rest"]
        totals = {name: tuple(pair) for name, pair in rest["totals"].items()}
        return FisherSums(square, totals, dict(rest["unbiased"]), rest["ratio"])
