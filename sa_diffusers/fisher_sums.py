"""Estimate the Fisher's sums over a sample set: shared by processes, saved now and then, resumed."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from sa_diffusers.artifacts import atomic_path
from sa_diffusers.config import ForgetConfig
from sa_diffusers.data import SampleSet
from sa_diffusers.families import Family
from sa_diffusers.fisher import FisherSums, estimate_fisher, merge
from sa_diffusers.fisher_linear import estimate_linear_fisher, is_linear
from sa_diffusers.losses import Batch
from sa_diffusers.paper_quirks import FisherLabelDropout, quirky_fisher_batch
from sa_diffusers.processes import process_state
from sa_diffusers.seeding import derive_seed


FISHER_SAVES = 10  # times that a long estimation saves its state


def estimate_sums(family: Family, config: ForgetConfig, samples: SampleSet, count: int, parts_dir: Path) -> FisherSums:
    """This process's share of the samples, saved now and then; then the sums of all processes."""
    state = process_state()
    own_path = parts_dir / f"{state.process_index}_of_{state.num_processes}.safetensors"
    parameters = dict(family.module.named_parameters())
    sums = _load_sums(own_path) if own_path.exists() else FisherSums.zeros(parameters)
    mine = [index for index in range(state.process_index, count, state.num_processes)]
    left = [index for index in mine if index not in sums.unbiased]
    block = max(1, -(-len(mine) // FISHER_SAVES))
    family.module.eval().requires_grad_(True)
    progress = tqdm(
        total=len(mine), initial=len(mine) - len(left), desc="fisher", disable=not state.is_main_process, mininterval=1
    )
    seed = derive_seed(config.seed, "fisher")
    linear = is_linear(family.module, family.loss)

    loss, quirks = family.loss, config.paper_quirks
    if "fisher_label_dropout" in quirks:
        loss = FisherLabelDropout(loss, family.pipeline.null_class)

    def batch(indices: list[int]) -> Batch:
        chosen = samples.take(indices)
        found = family.batch(chosen.latents, chosen.prompts)
        return quirky_fisher_batch(found, quirks, loss.num_terms, indices[0], seed) if quirks else found

    for start in range(0, max(len(left), 1), block):  # once at least: a process without samples adds zeros
        indices = left[start : start + block]
        if linear:
            estimate_linear_fisher(family.module, family.loss, batch, indices, seed=seed, sums=sums)
            progress.update(len(indices))
        else:
            for index in indices:
                estimate_fisher(
                    family.module,
                    loss,
                    parameters,
                    lambda i: batch([i]),
                    [index],
                    terms=None if family.loss.num_terms == 1 else config.terms,  # of one term there is no choice
                    chunk_size=config.fisher_chunk_size,
                    seed=seed,
                    sums=sums,
                )
                progress.update()
        _save_sums(sums, own_path)
    progress.close()
    state.wait_for_everyone()
    names = [f"{rank}_of_{state.num_processes}.safetensors" for rank in range(state.num_processes)]
    return merge(_load_sums(parts_dir / name) for name in names)


def _save_sums(sums: FisherSums, path: Path) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sums.square.items()}
    rest = {"totals": sums.totals, "unbiased": list(sums.unbiased.items()), "ratio": sums.ratio}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"rest": json.dumps(rest)})


def _load_sums(path: Path) -> FisherSums:
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["rest"])
    square = {name: tensor.to(process_state().device) for name, tensor in load_file(path).items()}
    totals = {name: tuple(pair) for name, pair in rest["totals"].items()}
    return FisherSums(square, totals, dict(rest["unbiased"]), rest["ratio"])
