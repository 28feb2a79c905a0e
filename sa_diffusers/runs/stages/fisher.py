"""The Fisher of the whole module, whatever the scope: of this run's samples, or one that the user names.

Its sums over a sample set are shared by processes, saved now and then, and resumed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.fisher import FisherSums, estimate_fisher, merge
from sa_diffusers.core.fisher_file import Fisher, FisherMismatch
from sa_diffusers.core.fisher_linear import estimate_linear_fisher, is_linear
from sa_diffusers.core.losses import Loss
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sharing import load_fisher
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path, explain_read_errors, load_tensors, save_tensors
from sa_diffusers.io.hub import provenance
from sa_diffusers.io.processes import process_state, say, working
from sa_diffusers.io.stages import Artifact, Stage
from sa_diffusers.models.memory import free_memory
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.models.quantization import gradients_of
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.runs.paper_quirks import FisherLabelDropout, quirky_fisher_batch
from sa_diffusers.runs.stages.samples import SamplesStage


GRADIENT = 3.0  # forward passes that a gradient is worth
FISHER_SAVES = 10  # times that a long estimation saves its state
ROOM = {True: 0.6, False: 0.4}  # of the free memory, with and without checkpointing; the rest is for activations


class FisherStage(Stage[Fisher]):
    """The Fisher."""

    name = counts_as = "fisher"
    inputs, fields = (SamplesStage.name,), ("fisher_terms", "seed", "paper_quirks")
    leaves = ("fisher.safetensors",)

    def content(self, context: RunContext) -> dict:
        layers = {} if context.options.fisher_layers == "all" else {"layers": trained_names(context)}
        return context.computed_in | belongs_to(context) | {"num_samples": self._count(context)} | layers

    def given(self, context: RunContext) -> Artifact[Fisher] | None:
        """The Fisher that the options name. Raises FisherMismatch: another model's."""
        if not context.options.fisher:
            return None
        fisher = load_fisher(context.options.fisher)
        fisher.check(**belongs_to(context), paper_quirks=", ".join(context.options.paper_quirks) or None)
        if missing := [name for name in trained_names(context) if name not in fisher.tensors]:
            raise FisherMismatch(
                f"the Fisher is of fewer layers than this run trains: it has no {missing[0]}; omit --fisher to "
                "estimate it"
            )
        return Artifact(fisher, fingerprint(fisher.metadata), fisher.metadata)

    def info(self, result: Fisher) -> dict:
        return result.metadata

    def compute(self, context: RunContext) -> Fisher:
        folder, count = self.workspace(context), self._count(context)
        samples, options = context.value(SamplesStage.name), context.options
        names = None if options.fisher_layers == "all" else trained_names(context)
        sums = estimate_sums(context.family, options, samples, count, folder, names, loss_of(context))
        fisher = sums.finish(self._metadata(context))
        # As one that was loaded: EWC takes what it needs to the device, in its own precision.
        fisher.tensors = {name: tensor.cpu() for name, tensor in fisher.tensors.items()}
        if process_state().is_main_process:
            with atomic_path(self._path(context)) as temporary:
                fisher.save(temporary)
            error = fisher.metadata["total_relative_error"]
            if error is not None:
                say(f"fisher: its sum over all weights is known to {error:.1%} (standard error, {count} samples)")
        return fisher

    def load(self, context: RunContext) -> Fisher:
        return Fisher.load(self._path(context))

    def workspace(self, context: RunContext) -> Path:
        return context.folder / ".fisher_parts"

    def describe(self, context: RunContext) -> str:
        exact = self._count(context) * loss_of(context).num_terms
        return f"{self._gradients(context)} gradient evaluations (the paper's way: {exact})"

    def passes(self, context: RunContext) -> float:
        return self._gradients(context) * GRADIENT

    def amount(self, context: RunContext) -> tuple[int, str]:
        return self._gradients(context), "gradients"

    def _metadata(self, context: RunContext) -> dict:
        options, terms = context.options, self._terms(context)
        quirks = {"paper_quirks": ", ".join(options.paper_quirks)} if options.paper_quirks else {}
        quirks |= {} if options.fisher_layers == "all" else {"layers": "those trained"}
        own = {
            "terms": "all" if terms is None else options.fisher_terms,
            "num_evaluations": self._gradients(context),
            "seed": options.seed,
            "samples": context.artifacts[SamplesStage.name].fingerprint,
            "estimator": "every timestep" if terms is None else "two stratified draws, one scale a tensor",
            "dtype": "float32",
        }
        return belongs_to(context) | own | quirks | provenance(options.model, options.revision)

    @staticmethod
    def _terms(context: RunContext) -> int | None:
        return None if loss_of(context).num_terms == 1 else context.options.terms

    def _gradients(self, context: RunContext) -> int:
        terms = self._terms(context)
        return self._count(context) * (loss_of(context).num_terms if terms is None else 2 * terms)

    @staticmethod
    def _count(context: RunContext) -> int:
        samples = context.value(SamplesStage.name)
        return min(context.options.fisher_samples, context.options.num_samples if samples is None else len(samples))

    @staticmethod
    def _path(context: RunContext) -> Path:
        return context.folder / "fisher.safetensors"


def trained_names(context: RunContext) -> list[str]:
    """The weights that this run trains, or that its adapters lie on."""
    options, family = context.options, context.family
    if options.lora_rank:
        return [f"{name}.weight" for name in family.adapted_layers(options.train_scope, options.lora_targets)]
    return list(family.trainable(options.train_scope))


def changed_names(context: RunContext) -> list[str] | None:
    """All weights that this run will change, where those are its adapters' alone; None: it may be any."""
    others = context.adapters or context.merge is not None
    return trained_names(context) if context.options.leaves_adapter and not others else None


def belongs_to(context: RunContext) -> dict:
    """The model and the unit of its loss, by the names of a Fisher's metadata."""
    loss = loss_of(context)
    return {
        "model_hash": context.artifacts["model"].fingerprint[context.family.component],
        "reduction": loss.reduction,
        "num_terms": loss.num_terms,
        "prediction_type": loss.prediction_type,
        **loss.grid,
    }


def loss_of(context: RunContext) -> Loss:
    """What the Fisher is of."""
    return context.method.fisher_loss(context)


def estimate_sums(
    family: Family,
    options: RunOptions,
    samples: SampleSet,
    count: int,
    parts_dir: Path,
    names: Sequence[str] | None = None,
    loss: Loss | None = None,
) -> FisherSums:
    """This process's share of the samples, saved now and then; then the sums of all processes.

    Args:
        names: of the weights; None: all.
        loss: what it is of; None: the family's own.
    """
    state = process_state()
    own_path = parts_dir / f"{state.process_index}_of_{state.num_processes}.safetensors"
    mine = [index for index in range(state.process_index, count, state.num_processes)]
    block = max(1, -(-len(mine) // FISHER_SAVES))
    with _differentiable(family, options.gradient_checkpointing, names) as parameters, ExitStack() as shown:
        device = sums_device(family, options, parameters)
        sums = _load_sums(own_path, device) if own_path.exists() else FisherSums.zeros(parameters, device)
        left = [index for index in mine if index not in sums.unbiased]
        advance = shown.enter_context(working("fisher", len(mine), "samples", len(mine) - len(left)))
        for start in range(0, max(len(left), 1), block):  # once at least: a process without samples adds zeros
            chosen = left[start : start + block]
            _add(family, options, samples, chosen, sums, advance, parameters, loss or family.loss)
            _save_sums(sums, own_path)
    if state.num_processes == 1:
        return sums
    del sums  # there may be no room for all processes' at once
    state.wait_for_everyone()
    names = [f"{rank}_of_{state.num_processes}.safetensors" for rank in range(state.num_processes)]
    return merge(_load_sums(parts_dir / name, device) for name in names)


@contextmanager
def _differentiable(
    family: Family, checkpointing: bool, names: Sequence[str] | None
) -> Iterator[dict[str, nn.Parameter]]:
    """The module as the estimator needs it, for a while: these weights' gradients, activations recomputed if asked."""
    family.module.eval().requires_grad_(False)
    if checkpointing:
        family.module.enable_gradient_checkpointing()
    dtype = family.compute_dtype or family.module.dtype
    try:
        with (
            gradients_of(family.module, names, dtype) as parameters,
            autocast_forward(family.module, family.compute_dtype),
        ):
            yield parameters
    finally:
        if checkpointing:
            family.module.disable_gradient_checkpointing()


def _add(
    family: Family,
    options: RunOptions,
    samples: SampleSet,
    indices: list[int],
    sums: FisherSums,
    advance: Callable,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
) -> None:
    """Add the squared gradients of some samples to the sums."""
    plain, quirks, seed = loss, options.paper_quirks, derive_seed(options.seed, "fisher")
    if "fisher_label_dropout" in quirks:
        loss = FisherLabelDropout(loss, family.pipeline.null_class)

    def batch(chosen: list[int]) -> Batch:
        part = samples.take(chosen)
        found = family.batch(part.latents, part.conditions)
        return quirky_fisher_batch(found, quirks, loss.num_terms, chosen[0], seed) if quirks else found

    if options.fisher_layers == "all" and is_linear(family.module, plain):
        estimate_linear_fisher(family.module, plain, batch, indices, seed=seed, sums=sums)
        advance(len(indices))
        return
    for index in indices:
        estimate_fisher(
            family.module,
            loss,
            parameters,
            lambda i: batch([i]),
            [index],
            terms=None if plain.num_terms == 1 else options.terms,  # of one term there is no choice
            chunk_size=options.fisher_chunk_size,
            loss_scale=float16_scale(family) if family.compute_dtype == torch.float16 else None,
            seed=seed,
            sums=sums,
        )
        advance()


def float16_scale(family: Family) -> float:
    """Makes the gradient that of a sum over data, which float16 holds, whether the loss is a sum or a mean."""
    return float(math.prod(family.latent_shape)) if family.loss.reduction == "mean" else 1.0


def sums_device(
    family: Family, options: RunOptions, parameters: Mapping[str, nn.Parameter] | None = None
) -> torch.device:
    """Where the sums are kept: with the weights, unless they and the gradients of two draws do not fit there."""
    device = family.device
    if options.fisher_device == "auto" and device.type == "cuda":
        needed = 3 * 4 * sum(p.numel() for p in (parameters or dict(family.module.named_parameters())).values())
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
