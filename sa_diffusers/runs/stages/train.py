"""What the method does to the model: training, an edit or a wrapping; and the pipeline that comes of it, saved."""

import copy
import json
import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from torch import nn

from sa_diffusers.core.closed_form import start_from_edit
from sa_diffusers.core.objectives import Frozen
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.io.atomic_files import atomic_path, file_hash, write_json
from sa_diffusers.io.configuration import identity_names, unsaid
from sa_diffusers.io.hub import commit_of
from sa_diffusers.io.loading import save_pipeline
from sa_diffusers.io.model_names import folder_name, public_name
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Artifact, Stage
from sa_diffusers.methods import editor
from sa_diffusers.methods.base import Weights
from sa_diffusers.models.precision import autocast_forward, release
from sa_diffusers.models.quantization import unquantized
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.edit import EditStage
from sa_diffusers.runs.stages.tracking import SNAPSHOTS, tracker
from sa_diffusers.runs.work_options import MethodOptions
from sa_diffusers.training.for_others import FOR_OTHERS, add_what_was_asked_since, save_for_others
from sa_diffusers.training.loop import DROPOUTS, train
from sa_diffusers.training.lora import LORA_FILE as ADAPTER_FILE
from sa_diffusers.training.lora import WithoutLora, add_lora, fuse_lora, load_adapters, lora_file, save_lora
from sa_diffusers.training.options import TrainingConfig


History = list[dict]
TRAINED = "trained"  # folder of what training left, where another strength was chosen as the result


class TrainStage(Stage[History]):
    """The history of training, empty where there was none; the model has forgotten then, and is saved."""

    name = counts_as = "train"
    inputs = ("model", "samples", "replay_samples", "surrogate", "concept_samples", "fisher", "edit", "pictures")
    keeps_work = shown = True

    def __init__(self, folder: Path):
        kept = f"{TRAINED}/" if (folder / TRAINED).exists() else ""
        parts = ("pipeline/**/*", "lora/*", *FOR_OTHERS)
        self.home, self.leaves = folder / kept, (*(f"{kept}{part}" for part in parts), "history.json")

    def content(self, context: RunContext) -> dict:
        method, options, concepts = context.method, context.options, context.concepts
        names = ["method", "dtype", *(identity_names(method.Options) if method.Options else ())]
        said = concepts.key | {"surrogate_kind": concepts.surrogate_kind}
        if method.trains:
            names += [*identity_names(TrainingConfig), *identity_names(MethodOptions)]
            names += ["seed", "fresh_samples", "latents", "replay_negative", "snapshot_steps", "early_stop"]
            if options.early_stop is not None:  # what is looked at then decides when training ends
                names += ["track_steps", "track_images", "guidance_scale", "num_inference_steps", "sampler"]
                said |= {"exam": context.artifacts["exam"].fingerprint}
            said |= {"surrogate": concepts.each("surrogate") if concepts.surrogate_kind == "prompt" else None}
            said |= {"siblings": concepts.each("siblings"), "prompts": context.artifacts["prompts"].fingerprint}
            said |= context.computed_in
            if options.finish:
                said |= {"finish": EditStage().key(context)}
            if context.adapters:
                said |= {"after": [file_hash(file) for file in context.adapters]}
            if context.chain and not options.chain_memory:
                said |= {"chain_memory": False}
            if options.adapters == "each":
                said |= {"adapters": "each"} | ({"edit": EditStage().key(context)} if "edit" in context.needs else {})
        left_out = unsaid(options)
        return said | {name: getattr(options, name) for name in names if name not in left_out}

    def compute(self, context: RunContext) -> History:
        options, family, folder, state = context.options, context.family, context.folder, process_state()
        each, history = options.adapters == "each", []
        if context.method.trains:
            if not any((folder / "checkpoints").glob("step_*")):
                shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)  # of what --overwrite replaces
            history = forget_each(context, self.home / "lora") if each else forget_by_training(remembering(context))
        elif "edit" in context.needs:
            family.edit(context.value("edit"))
        if state.is_main_process and not each:
            shutil.rmtree(self.home / "lora", ignore_errors=True)  # of what --overwrite replaces
            if options.leaves_adapter:
                save_lora(family, self.home / "lora", options.dtype)
        with unquantized(family.module, options.quantize_base):
            if options.lora_rank:
                fuse_lora(family.module)
            if options.finish:  # of the maps as they are now
                family.edit(EditStage.editor(context).edit(context))
            if state.is_main_process:
                # Saved before it is judged: whatever happens there, the result is not lost.
                saved, records = (options.dtype, options.save_variant), [*context.forgotten, *records_of(context)]
                save_pipeline(family.pipeline, self.home / "pipeline", family.module, *saved, records)
                for name in FOR_OTHERS:
                    (self.home / name).unlink(missing_ok=True)  # of what --overwrite replaces
                save_for_others(family, self.home, options)
                write_json(history, folder / "history.json")
        return history

    def load(self, context: RunContext) -> History:
        family, pipeline = context.family, self.home / "pipeline"
        with unquantized(family.module, context.options.quantize_base):
            load_weights(family.module, pipeline, family.component)
            if process_state().is_main_process:
                add_what_was_asked_since(family, self.home, context.options)
        return json.loads((context.folder / "history.json").read_text())

    def workspace(self, context: RunContext) -> Path:
        return context.folder / "checkpoints"

    def describe(self, context: RunContext) -> str:
        options, method = context.options, context.method
        if not method.trains:
            return method.title
        batch = f"{options.train_batch_size}" + (f" + {options.train_batch_size}" if options.replay_weight else "")
        said = [f"{options.num_train_steps} steps of {batch}", f"scope {options.train_scope}"]
        said += [f"LoRA of rank {options.lora_rank}"] if options.lora_rank else []
        said += [f"{len(context.requested)} times, each by itself"] if options.adapters == "each" else []
        said += [f"beside {len(context.adapters)} kept"] if context.adapters else []
        said += [f"from {start_of(context)}"] if "edit" in context.needs else []
        said += [f"lambda {options.ewc_lambda:g}"] if options.ewc_lambda else []
        said += [f"then {editor(options.edit).strength(options)}"] if options.finish else []
        return ", ".join(said)

    def passes(self, context: RunContext) -> float:
        options = context.options
        if not context.method.trains:
            return 0.0
        times = len(context.requested) if options.adapters == "each" else 1
        return times * options.num_train_steps * options.train_batch_size * context.method.training_passes(options)

    def amount(self, context: RunContext) -> tuple[int, str]:
        history, options = context.value(self.name), context.options
        steps = history[-1]["step"] if history else 0
        return options.train_batch_size * (2 if options.replay_weight else 1) * steps, f"samples, {steps} steps"


def method_of(context: RunContext) -> str:
    """The method as records name it."""
    return context.method.title + finished(context)


def records_of(context: RunContext) -> list[dict]:
    """What forgotten.json says of this run, a record a concept."""
    method, options = context.method, context.options
    common = {
        "method": method_of(context),
        "surrogate_kind": context.concepts.surrogate_kind,
        "date": context.started,
        "model": public_name(options.model),
        "revision": commit_of(options.model, options.revision),
        "before": context.artifacts["model"].fingerprint,
    }
    own = context.requested
    pairs = zip(own, context.surrogates[-len(own) :], strict=True)
    return [{"concept": one.said, "surrogate": instead if method.favours else None} | common for one, instead in pairs]


def load_weights(module: nn.Module, pipeline: Path, component: str) -> None:
    """Put those of a saved pipeline's part into a module, in its precision."""
    saved = type(module).from_pretrained(pipeline, subfolder=component, dtype=module.dtype)
    module.load_state_dict(saved.state_dict())


def start_of(context: RunContext) -> str:
    """What training starts from, in words, where that is an edit."""
    rank = context.options.lora_rank
    return editor(context.options.edit).strength(context.options) + (f", its best part of rank {rank}" if rank else "")


def starts_at_edit(context: RunContext) -> bool:
    return context.method.trains and "edit" in context.needs


def made_by(context: RunContext) -> str:
    """The method's name, with the edit that has done a part of its work."""
    started = f" from {editor(context.options.edit).title}" if starts_at_edit(context) else ""
    return context.method.title + started + finished(context)


def finished(context: RunContext) -> str:
    return f", then {editor(context.options.edit).title}" if context.options.finish else ""


def forget_by_training(context: RunContext) -> History:
    """Minimise the method's objective over the scope's weights, in place."""
    options, family, method = context.options, context.family, context.method
    weights, frozen = weights_to_train(context), None
    if "frozen" in context.needs:  # a model that drops would be drawn away from its own predictions by that
        frozen = frozen_module(context)
        switch_off_dropout(family.module)
    objective = method.objective(context, weights, frozen)
    if "edit" in context.needs:  # only now: EWC's anchor is the model as it was
        for part, edit in context.value("edit").items():
            if any(family.reads_text(name) == part for name in weights):
                start_from_edit(family.module, weights, edit, lambda name, part=part: family.reads_text(name) == part)
    batches = method.batches(context)
    settings = TrainingConfig(**{field.name: getattr(options, field.name) for field in fields(TrainingConfig)})
    # Training's own forward passes autocast by accelerate, those of a frozen copy do not.
    copied = isinstance(frozen, nn.Module)
    try:
        # Through the text encoders, every few steps.
        searching = "concept_samples" in context.needs and not options.robust_embedding
        with (
            autocast_forward(frozen, family.compute_dtype) if copied else nullcontext(),
            family.encoders_at_hand() if searching else nullcontext(),
        ):
            return train(
                family.module, objective, batches, settings, seed=derive_seed(options.seed, "train"),
                checkpoint_dir=context.folder / "checkpoints", callback=tracker(context),
                callback_steps=options.callback_steps, log_dir=context.folder / "logs", description="forget",
            )  # fmt: skip
    finally:
        if copied:
            release(frozen)


def remembering(context: RunContext) -> RunContext:
    """The run with what training shows of it: without memory of earlier requests, of its own concepts alone."""
    earlier = len(context.concepts) - len(context.requested)
    return (
        context if context.options.chain_memory else context.of(range(earlier, len(context.concepts)), context.folder)
    )


def forget_each(context: RunContext, folder: Path) -> History:
    """Train an adapter a concept, none beside another of this run, all of them on the module at the end.

    Args:
        folder: gets a file of each.
    """
    family, state, history = context.family, process_state(), []
    earlier, parts = len(context.concepts) - len(context.requested), {}
    for row in range(earlier, len(context.concepts)):
        name = context.concepts[row].name
        remembered = range(earlier) if context.options.chain_memory else ()
        part = context.of([*remembered, row], context.folder / "checkpoints" / folder_name(name))
        parts[lora_file(name)], done = part.folder / "lora" / ADAPTER_FILE, part.folder / "history.json"
        if not done.exists():
            if "edit" in context.needs:
                part.artifacts["edit"] = Artifact(EditStage.editor(part).edit(part), None)
            found = forget_by_training(part)
            if state.is_main_process:
                save_lora(family, part.folder / "lora", context.options.dtype)
                write_json(found, done)
            family.module.unload_lora()
            state.wait_for_everyone()
        steps = history[-1]["step"] if history else 0
        history += [line | {"step": steps + line["step"]} for line in json.loads(done.read_text())]
    if state.is_main_process:
        with atomic_path(folder) as new:
            new.mkdir()
            for name, file in parts.items():
                shutil.copyfile(file, new / name)
    load_adapters(family, [*context.adapters, *parts.values()])
    return history


def weights_to_train(context: RunContext) -> Weights:
    """The scope's weights, or the low-rank changes of them, by name; nothing else requires a gradient then."""
    options, family = context.options, context.family
    family.module.requires_grad_(False)
    if options.lora_rank:
        layers = family.adapted_layers(options.train_scope, options.lora_targets)
        alpha = options.lora_alpha or options.lora_rank
        load_adapters(family, context.adapters)
        return add_lora(family.module, layers, options.lora_rank, alpha, options.seed)
    weights = family.trainable(options.train_scope)
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


def frozen_module(context: RunContext) -> Frozen:
    """The model before forgetting, to be called like it: a copy, or where adapters are trained the model without."""
    if context.options.lora_rank:
        return WithoutLora(context.family.module)
    frozen = copy.deepcopy(context.family.module).eval().requires_grad_(False)
    if context.options.compile_backend:
        frozen.compile(backend=context.options.compile_backend)
    return frozen


def switch_off_dropout(module: nn.Module) -> None:
    """For good: a model that has forgotten is saved with its configuration, which knows its dropout."""
    for part in module.modules():
        if isinstance(part, DROPOUTS):
            part.p = 0.0
