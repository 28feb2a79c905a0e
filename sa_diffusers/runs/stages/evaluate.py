"""What the model is found to do, before and after: by classifiers, or by pictures and its own loss."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch import Tensor

from sa_diffusers.data.sampling import Request, largest_batch
from sa_diffusers.evaluation.completion import JUDGED, examine_completions
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.forgetting import Findings, examine, replay_loss
from sa_diffusers.evaluation.judges.clip import Clip
from sa_diffusers.evaluation.judges.preference import ClipPreferenceJudge, PreferenceJudge
from sa_diffusers.io import bundled
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.loading import model_hash
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Artifact, Stage, content_fingerprint
from sa_diffusers.runs.context import Inputs, RunContext
from sa_diffusers.runs.stages.replay import ReplayStage
from sa_diffusers.runs.stages.samples import drawing_passes


SHIPPED = ("before.safetensors", "before.bf16.safetensors")  # beside a model: drawn in float32, and in bfloat16
KEPT_LOSS_SAMPLES = 64  # replay samples on which the loss is compared


class EvaluateStage(Stage[Findings]):
    """One judgement of the model as it stands."""

    counts_as, fields = "evaluate", ("guidance_scale", "num_inference_steps", "sampler", "seed")
    reads, shown = (ReplayStage.name,), True
    legends = (("exam.exams", "of eval_prompts, eval_images_concept, eval_images_class and eval_images_other"),)
    known: Mapping[str, Tensor] = {}  # of `draw_sets`

    def __init__(self, name: str, inputs: tuple[str, ...]):
        self.name, self.inputs, self.leaves = name, inputs, (f"evaluation/{name}.safetensors",)

    def content(self, context: RunContext) -> dict:
        if context.pictures:
            return context.computed_in | {"eval_masks": context.options.eval_masks}
        if context.inputs.judges:  # whose part of the key says what is drawn
            return context.computed_in
        looked_at = [[request.key for request in part.requests] for part in context.inputs.sets.values()]
        judge = {} if context.preference is None else {"preference": context.preference.key}
        return context.computed_in | judge | {"looked_at": content_fingerprint(looked_at)}

    def given(self, context: RunContext) -> Artifact[Findings] | None:
        if self.name != "before":
            return None
        asked, key = context.options.before, self.key(context)
        # What the chain's last run was compared with, and what ships with a model, serve where they fit.
        shipped = [bundled.beside(context.options.model, name) for name in SHIPPED]
        sources = [asked] if asked else [*(link.folder for link in context.chain[-1:]), *shipped]
        for source in map(Path, filter(None, sources)):
            path = self._path(source) if source.is_dir() else source
            if asked and not path.is_file():
                said = "expected --before with a run's folder, or its evaluation/before.safetensors"
                raise ValueError(f"no {path}; {said}")
            found = Findings.load(path) if path.is_file() else None
            fault = found.misfit(key, self._requests(context)) if found else "is not there"
            if fault and asked:
                raise ValueError(f"the evaluation to reuse {fault}; omit --before")
            if not fault:
                self.known = found.drawn
                return Artifact(found, fingerprint(key)) if found.key == key else None
        return None

    def compute(self, context: RunContext) -> Findings:
        findings = self._examine(context)
        findings.key = self.key(context)
        if process_state().is_main_process:
            findings.save(self._path(context.folder))
        return findings

    def load(self, context: RunContext) -> Findings:
        return Findings.load(self._path(context.folder))

    def workspace(self, context: RunContext) -> Path:
        return context.folder / "evaluation" / f".{self.name}_parts"

    def describe(self, context: RunContext) -> str:
        there = self._there(context)
        return f"{self._count(context)} pictures" + (f", {there} of them drawn before" if there else "")

    def passes(self, context: RunContext) -> float:
        left = self._count(context) - self._there(context)
        drawn = drawing_passes(context, left, context.options.guidance_scale)
        judged = context.preference.passes * len(context.inputs.sets["concept"]) if context.preference else 0.0
        return drawn + judged

    def amount(self, context: RunContext) -> tuple[int, str]:
        return self._count(context), "images"

    def _examine(self, context: RunContext) -> Findings:
        family, inputs, options = context.family, context.inputs, context.options
        if inputs.pictures:
            asked = options.eval_masks, options.seed, options.num_inference_steps
            return examine_completions(family, inputs.pictures, inputs.judges, *asked)
        workspace = self.workspace(context)
        pictures = draw_sets(family, inputs.sets, options.judged, known=self.known, parts_dir=workspace)
        judged, earlier = (inputs.judges, options.seed, context.preference), context.value("before")
        findings = examine(family, inputs.sets, pictures, *judged, earlier)
        if self.name == "before":
            found = zip(self._requests(context), chain(*(part.latents for part in pictures.values())), strict=True)
            findings.drawn = {request.fingerprint: latent for request, latent in found}
        replay = context.value(ReplayStage.name)
        if replay is not None:
            findings.values["replay_loss"] = replay_loss(family, replay, KEPT_LOSS_SAMPLES, options.seed)
        return findings

    @staticmethod
    def _requests(context: RunContext) -> list[Request]:
        """All pictures, in the order in which they are drawn."""
        return [request for part in context.inputs.sets.values() for request in part.requests]

    def _there(self, context: RunContext) -> int:
        return sum(request.fingerprint in self.known for request in self._requests(context)) if self.known else 0

    @staticmethod
    def _count(context: RunContext) -> int:
        judged = sum(len(group.test) for name, group in context.pictures.items() if name in JUDGED)
        return sum(map(len, context.inputs.sets.values())) + judged * len(getattr(context.options, "eval_masks", ()))

    def _path(self, folder: Path) -> Path:
        return folder / "evaluation" / f"{self.name}.safetensors"


class RetrainedStage(EvaluateStage):
    """The same of a model that never learned what is forgotten, which leaves the memory then."""

    def __init__(self):
        super().__init__("retrained", ("retrained_model", "exam", "pictures"))

    def _examine(self, context: RunContext) -> Findings:
        model = context.artifacts["retrained_model"]
        context.artifacts["retrained_model"] = replace(model, value=None)
        return super()._examine(replace(context, family=model.value))


def exam_content(inputs: Inputs) -> dict:
    """The prompts and classifiers that a model is judged by."""
    drawn = {name: [request.key for request in part.requests] for name, part in inputs.sets.items()}
    judges = {name: model_hash(judge.classifier) for name, judge in inputs.judges.items()}
    return {"exams": dict.fromkeys(judges, fingerprint(drawn)), "classifiers": judges}


def preference_of(context: RunContext) -> PreferenceJudge | ClipPreferenceJudge:
    """What judges between a concept and what takes its place where no classifier does."""
    options, concepts = context.options, context.concepts
    if options.clip and context.favours_words:
        return ClipPreferenceJudge(Clip.load(options.clip), concepts)
    at_once = options.eval_batch_size or largest_batch(context.family)
    return PreferenceJudge(context.family, concepts, context.favours_words, at_once)
