"""The Fisher of the whole module, whatever the scope: of this run's samples, or one that the user names."""

from pathlib import Path

from sa_diffusers.core.fisher_file import Fisher
from sa_diffusers.data.sampling import remove_parts
from sa_diffusers.data.sharing import load_fisher
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.hub import provenance
from sa_diffusers.io.processes import process_state, say
from sa_diffusers.io.stages import Artifact, Stage
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.fisher_sums import estimate_sums
from sa_diffusers.runs.stages.samples import SamplesStage


GRADIENT = 3.0  # forward passes that a gradient is worth


class FisherStage(Stage[Fisher]):
    """The Fisher."""

    name = counts_as = "fisher"
    inputs, fields = (SamplesStage.name,), ("fisher_terms", "seed", "paper_quirks")
    leaves = ("fisher.safetensors",)

    def content(self, context: RunContext) -> dict:
        return context.computed_in | belongs_to(context) | {"num_samples": self._count(context)}

    def given(self, context: RunContext) -> Artifact[Fisher] | None:
        """The Fisher that the options name. Raises FisherMismatch: another model's."""
        if not context.options.fisher:
            return None
        fisher = load_fisher(context.options.fisher)
        fisher.check(**belongs_to(context), paper_quirks=", ".join(context.options.paper_quirks) or None)
        return Artifact(fisher, fingerprint(fisher.metadata), fisher.metadata)

    def info(self, result: Fisher) -> dict:
        return result.metadata

    def compute(self, context: RunContext) -> Fisher:
        folder, count = self.workspace(context), self._count(context)
        sums = estimate_sums(context.family, context.options, context.value(SamplesStage.name), count, folder)
        fisher = sums.finish(self._metadata(context))
        # As one that was loaded: EWC takes what it needs to the device, in its own precision.
        fisher.tensors = {name: tensor.cpu() for name, tensor in fisher.tensors.items()}
        if process_state().is_main_process:
            with atomic_path(self._path(context)) as temporary:
                fisher.save(temporary)
            error = fisher.metadata["total_relative_error"]
            if error is not None:
                say(f"fisher: its sum over all weights is known to {error:.1%} (standard error, {count} samples)")
        remove_parts(folder)
        return fisher

    def load(self, context: RunContext) -> Fisher:
        return Fisher.load(self._path(context))

    def workspace(self, context: RunContext) -> Path:
        return context.folder / ".fisher_parts"

    def describe(self, context: RunContext) -> str:
        exact = f"the paper's way: {self._count(context) * context.family.loss.num_terms}"
        if context.options.terms is not None:
            exact += "; on the bundled model the cheap way agreed with it at Spearman .95, total .96"
        return f"{self._gradients(context)} gradient evaluations ({exact})"

    def passes(self, context: RunContext) -> float:
        return self._gradients(context) * GRADIENT

    def amount(self, context: RunContext) -> tuple[int, str]:
        return self._gradients(context), "gradients"

    def _metadata(self, context: RunContext) -> dict:
        options, terms = context.options, self._terms(context)
        quirks = {"paper_quirks": ", ".join(options.paper_quirks)} if options.paper_quirks else {}
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
        return None if context.family.loss.num_terms == 1 else context.options.terms

    def _gradients(self, context: RunContext) -> int:
        terms = self._terms(context)
        return self._count(context) * (context.family.loss.num_terms if terms is None else 2 * terms)

    @staticmethod
    def _count(context: RunContext) -> int:
        samples = context.value(SamplesStage.name)
        return min(context.options.fisher_samples, context.options.num_samples if samples is None else len(samples))

    @staticmethod
    def _path(context: RunContext) -> Path:
        return context.folder / "fisher.safetensors"


def belongs_to(context: RunContext) -> dict:
    """The model and the unit of its loss, by the names of a Fisher's metadata."""
    family = context.family
    return {
        "model_hash": context.artifacts["model"].fingerprint[family.component],
        "reduction": family.loss.reduction,
        "num_terms": family.loss.num_terms,
        "prediction_type": family.loss.prediction_type,
    }
