"""Surrogates that are left to the model: chosen by its predictions, or by short trainings with several."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.data.concepts.candidates import forgotten_besides, tries
from sa_diffusers.evaluation.judges.preference import PREFERENCE
from sa_diffusers.io.atomic_files import read_json, write_json
from sa_diffusers.io.model_names import folder_name
from sa_diffusers.io.processes import process_state, say
from sa_diffusers.io.stages import Artifact, Stage, Stages, content_fingerprint
from sa_diffusers.models.precision import kept_weights
from sa_diffusers.runs.chain import saying
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.inputs import sets_to_look_at
from sa_diffusers.runs.stages import stages_of
from sa_diffusers.runs.stages.auto import AutoStage, said_of_choice
from sa_diffusers.runs.stages.evaluate import EvaluateStage, exam_content, preference_of
from sa_diffusers.runs.stages.fisher import FisherStage, changed_names
from sa_diffusers.runs.stages.samples import DRAWING, SamplesStage
from sa_diffusers.runs.stages.train import TrainStage


SHORT = 0.25  # of a run's steps and surrogate pictures, in a trial
ALIKE = 0.05  # share of pictures by which trials are alike in what they forget
# What a trial goes without, of a run's options.
WITHOUT = {
    **dict.fromkeys(("after", "before", "track_steps", "early_stop", "checkpointing_steps", "strength")),
    "adapters": "one", "classifier": [], "snapshot_steps": [], "strength_sheet": False, "save_single_file": False,
}  # fmt: skip
Tried = dict[str, dict[str, dict[str, float]]]  # of each concept and word, what its trial left


class TrialStage(Stage[Tried]):
    """A short run of the method with each of the words that are tried, on samples and Fisher of the run."""

    name, counts_as, shown = "trials", "surrogate", True
    inputs = ("model", "prompts", "templates", AutoStage.name, SamplesStage.name, FisherStage.name)
    fields = ("num_surrogate_samples", "guidance_scale", "negative_guidance_scale", "clip", *DRAWING)
    leaves = ("surrogate/trials.json",)

    def content(self, context: RunContext) -> dict:
        return TrainStage(context.folder).content(context)

    def compute(self, context: RunContext) -> Tried:
        folder, found = context.folder / "surrogate", {}
        for choice in context.value(AutoStage.name):
            words = words_to_try(context, choice)
            found[choice["concept"]] = {word: self._trial(context, choice["concept"], word) for word in words}
        process_state().wait_for_everyone()
        if process_state().is_main_process:
            write_json(found, folder / "trials.json")
            for path in folder.glob("trial-*"):
                shutil.rmtree(path)
        process_state().wait_for_everyone()
        return found

    def load(self, context: RunContext) -> Tried:
        return read_json(context.folder / "surrogate" / "trials.json")

    def describe(self, context: RunContext) -> str:
        steps = f"{_short(context.options.num_train_steps)} steps each" if context.method.trains else "an edit each"
        return f"what takes the concept's place, by trials of {steps}"

    @staticmethod
    def _trial(context: RunContext, concept: str, word: str) -> dict[str, float]:
        row = next(i for i, one in enumerate(context.concepts) if one.said == concept)
        trial = context.of([row], context.folder / "surrogate" / f"trial-{folder_name(f'{concept} {word}')}")
        options = trial.options = copy.copy(context.options)
        counts = ("num_train_steps", "lr_warmup_steps", "num_surrogate_samples")
        short = {name: _short(getattr(options, name)) for name in counts}
        if context.value(SamplesStage.name) is not None:
            short["samples"] = options.samples or str(context.folder / "samples")
        if context.value(FisherStage.name) is not None:
            short["fisher"] = options.fisher or str(context.folder / "fisher.safetensors")
        for name, value in (WITHOUT | short).items():
            setattr(options, name, value)
        concepts = Concepts([replace(context.concepts[row], surrogate=word)])
        gone = forgotten_besides((record["concept"] for record in context.forgotten), concepts)
        sets = sets_to_look_at(concepts, context.prompts, trial.templates, options.seed, gone)
        trial.inputs = replace(trial.inputs, concepts=concepts, judges={}, sets=sets, requested=None)
        trial.artifacts |= {
            "templates": Artifact(trial.templates, content_fingerprint(trial.templates)),
            "exam": Artifact(sets, exam_content(trial.inputs)),
        }
        trial.preference = preference_of(trial)
        with kept_weights(context.family.module):
            stages = Stages(stages_of(trial), trial, context.options.overwrite)
            if any(isinstance(stage, EvaluateStage) and stage.name in stages.left for stage in stages.stages):
                trial.preference.freeze(changed_names(trial))
            for stage in stages.stages:
                stages.run(stage)
        values = trial.value("after").values
        return {name: values[name] for name in (PREFERENCE, "replay_loss") if name in values}


def words_to_try(context: RunContext, choice: Mapping[str, Any]) -> list[str]:
    """The words that stood the test, as many as are asked for; none where there is nothing to compare."""
    count = next(tries(one.surrogate) for one in context.concepts if one.said == choice["concept"])
    words = [one["word"] for one in choice["finalists"] if one["passed_over"] is None][:count]
    return words if len(words) > 1 else []


def best_of(tried: Mapping[str, Mapping[str, float]]) -> str:
    """Of the words under which least of the concept is left, or hardly more, the one that changes replay least."""
    least = min(one[PREFERENCE] for one in tried.values())
    alike = [word for word, one in tried.items() if one[PREFERENCE] <= least + ALIKE]
    return min(alike, key=lambda word: tried[word].get("replay_loss", 0.0))


def settle_surrogates(context: RunContext) -> None:
    """Choose what the user has left to the model, or read what was chosen; options and concepts say it from then on.

    Raises:
        ValueError: no word leads away from a concept. StageMismatch: the folder holds a choice of other options.
    """
    asked = max(tries(one.surrogate) for one in context.concepts)
    if not asked:
        return
    shared = [one for one in stages_of(context) if type(one) is SamplesStage or isinstance(one, FisherStage)]
    stages = Stages([AutoStage(), *([*shared, TrialStage()] if asked > 1 else [])], context, context.options.overwrite)
    for stage in stages.stages:
        stages.run(stage)
    context.spent = {AutoStage.counts_as: stages.seconds[AutoStage.counts_as]}
    choices, tried = context.value(AutoStage.name), context.value(TrialStage.name) or {}
    for choice in choices:
        if found := tried.get(choice["concept"]):
            choice |= {"chosen": best_of(found), "by": "trials"}
            for one in choice["finalists"]:
                one |= {"tried": found[one["word"]]} if one["word"] in found else {}
            choice["finalists"].sort(key=lambda one, chosen=choice["chosen"]: one["word"] != chosen)
    chosen = {one["concept"]: one["chosen"] for one in choices}
    settled = [replace(one, surrogate=chosen.get(one.said, one.surrogate)) for one in context.concepts]
    context.inputs = replace(context.inputs, concepts=Concepts(settled))
    context.options = saying(context.options, context.requested)
    say("\n".join(map(said_of_choice, choices)))


def _short(count: int) -> int:
    return max(1, round(SHORT * count)) if count else 0
