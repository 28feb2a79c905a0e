"""The Fisher of a chain: that of what its last run left, and decayed those before."""

from dataclasses import replace

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.fisher_file import Fisher, FisherMismatch
from sa_diffusers.data.replay import select_replay
from sa_diffusers.data.sharing import FISHER_FILE, load_fisher
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Artifact
from sa_diffusers.models.precision import kept_weights
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.fisher import FisherStage, trained_names
from sa_diffusers.runs.stages.samples import SamplesStage
from sa_diffusers.runs.stages.train import load_weights


class CarriedFisherStage(FisherStage):
    """The mean of sum_i decay^(k - i) F_i over the chain's runs i <= k, F_0 the original's: none counts twice.

    F_i is of what run i left, on those samples whose prompts name nothing that was forgotten by then.
    """

    def content(self, context: RunContext) -> dict:
        said = {"decay": context.options.chain_decay, "before": fingerprint(_before(context).metadata)}
        return super().content(context) | said | self._left(context)

    def compute(self, context: RunContext) -> Fisher:
        last, before, samples = context.chain[-1], _before(context), context.value(SamplesStage.name)
        every = dict(context.family.module.named_parameters())
        names = every if context.options.fisher_layers == "all" else trained_names(context)
        if missing := sorted(set(names) - before.tensors.keys()):
            raise FisherMismatch(
                f"the Fisher of {last.folder} is of fewer layers: it has no {missing[0]}; pass chain_fisher none"
            )
        earlier = Concepts(context.concepts[: len(context.concepts) - len(context.requested)])
        kept = Artifact(select_replay(samples, earlier, "none"), context.artifacts[SamplesStage.name].fingerprint)
        with kept_weights(context.family.module):
            load_weights(context.family.module, last.folder / "pipeline", context.family.component)
            fisher = super().compute(replace(context, artifacts=context.artifacts | {SamplesStage.name: kept}))
        weight = context.options.chain_decay * before.metadata.get("weight", 1.0)
        for name, tensor in fisher.tensors.items():
            tensor.add_(before.tensors[name], alpha=weight).div_(1 + weight)
        fisher.metadata |= {"weight": 1 + weight} | self._left(context)
        if process_state().is_main_process:
            with atomic_path(self._path(context)) as temporary:
                fisher.save(temporary)
        return fisher

    def describe(self, context: RunContext) -> str:
        return f"{super().describe(context)}, at the chain's end, and those before"

    @staticmethod
    def _left(context: RunContext) -> dict:
        """Whose it is: no other run's, though it has the names and shapes of the original's."""
        return {"model_hash": context.chain[-1].forgotten[-1]["after"][context.family.component]}


def _before(context: RunContext) -> Fisher:
    """Raises ValueError: the last run had none."""
    last = context.chain[-1]
    source = last.shared("fisher", FISHER_FILE)
    if source is None:
        raise ValueError(f"chain_fisher carried: {last.folder} had no Fisher; expected one, or pass none")
    return load_fisher(source)
