"""Forget a concept: the stages in their order, from a pipeline to one that has forgotten and a page that shows it."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from sa_diffusers import methods
from sa_diffusers.data.concepts.lists import Forget, as_options
from sa_diffusers.evaluation.forgetting import pairs
from sa_diffusers.families import checked_family, find_family, get_family
from sa_diffusers.families.plain_parts import check_plain, take_over, unwrapped
from sa_diffusers.io.artifacts import run_lock
from sa_diffusers.io.atomic_files import DiskFull, atomic_path
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import config_from_dict, config_to_yaml, layered
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.io.hub import check_push, push_folder
from sa_diffusers.io.loading import (
    check_model,
    copy_pipeline,
    load_pipeline,
    pipeline_hashes,
    read_model_index,
    read_tokenizer,
)
from sa_diffusers.io.model_names import base_name, folder_name
from sa_diffusers.io.processes import Listener, process_state, reporting, say, tell
from sa_diffusers.io.stages import Artifact, Stages, content_fingerprint
from sa_diffusers.models.precision import (
    compute_dtype,
    kept_state,
    on_device,
    usual_modes,
    weights_in_main_memory,
)
from sa_diffusers.models.quantization import quantized
from sa_diffusers.models.single_file import configurations
from sa_diffusers.report.run_page import notebook_view
from sa_diffusers.runs import options as run_options
from sa_diffusers.runs.adapters.earlier import keep_earlier
from sa_diffusers.runs.chain import Merge, chain_of, saying, taken_over
from sa_diffusers.runs.checks import check_run
from sa_diffusers.runs.context import Inputs, RunContext, prepared
from sa_diffusers.runs.inputs import claim_folder, read_inputs
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.runs.pictures import read_picture_inputs, read_retrained
from sa_diffusers.runs.plan import announce
from sa_diffusers.runs.results import all_written, combine, commands, table, write_results
from sa_diffusers.runs.stages import stages_of
from sa_diffusers.runs.stages.evaluate import EvaluateStage, exam_content, preference_of
from sa_diffusers.runs.stages.fisher import changed_names
from sa_diffusers.runs.stages.strengths import ChoiceStage, StrengthStage
from sa_diffusers.runs.surrogates.settling import settle_surrogates
from sa_diffusers.training.launching import check_launch


@dataclass
class Outcome:
    """What a run leaves: pipeline, numbers (metrics.json), the folder of the rest, and commands to go on by."""

    pipeline: DiffusionPipeline
    metrics: dict
    output_dir: Path
    commands: dict[str, str]

    def say(self) -> None:
        """Print the numbers, where pipeline and page are, and what to look closer by."""
        say(f"\n{table(self.metrics)}\n\npipeline: {self.output_dir / 'pipeline'}")
        say(f"report:   {(self.output_dir / 'report.html').resolve()}")
        for what, command in list(self.commands.items())[1:]:
            say(f"{what}:\n  {command}")


@usual_modes()
def forget(
    pipeline: DiffusionPipeline,
    concept: str | Sequence[Forget],
    surrogate: str | os.PathLike | None = None,
    *,
    inplace: bool = False,
    progress: bool = True,
    callback: Listener | None = None,
    output_dir: str | Path | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """Make a pipeline forget a concept, or several at once.

    Args:
        pipeline: of a class that a family adapts (`sa_diffusers.families`); left as it is unless `inplace`.
        concept: one or several phrasings of the concept, separated by commas; or several concepts, each with what
            takes its place: [Forget("seven, 7", "three"), Forget("red", "green")].
        surrogate: what takes its place: a prompt, a folder of images, "noise", or "auto", a word that it chooses, of
            three that it tries for "auto:3". None: looked up, for known concepts.
        inplace: whether to change the given pipeline's weights, not a copy's.
        progress: whether to print the plan and bars.
        callback: gets every event, a dict (docs/events.md); the run stops where it raises, or returns False.
        output_dir: keeps samples, Fisher, report, ...; and resumes from them. None: a temporary folder.
        options: any field of `ForgetConfig`.

    Returns:
        A pipeline of the same class, or of the method's where that leaves the weights as they are ("sld-*": it is led
        away while it draws), which shares all but the trained module with the given one. It shows itself in a
        notebook, and has three attributes more: `metrics`, what metrics.json holds, the verdict among it; `pictures`,
        {"group", "prompt", "before", "after"} with PIL images; and `forgotten`, what forgotten.json says of it.

    Raises:
        RunStopped: the callback has returned False; the same call goes on from there where there is an output_dir.
        TypeError: no pipeline of a class that is handled. ValueError: options that cannot work, before any computing.
    """
    component = checked_family(pipeline).component
    modules = {n: unwrapped(part) for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    check_plain(modules, component)
    precisions = {n: m.dtype for n, m in modules.items() if n == component or n.startswith("text_encoder")}
    if len(set(precisions.values())) > 1:
        # transformers keeps the precision of the files, diffusers loads float32: pictures could not be drawn.
        raise ValueError(f"expected components of one precision, got {precisions}; load the pipeline with dtype=...")
    given = as_options(concept, surrogate, **options)
    config = _config_of(pipeline, str(modules[component].dtype).removeprefix("torch."), given)
    method = methods.get(config.method)
    if inplace and type(method).wrap is not methods.Method.wrap:
        raise ValueError(f"{method.name} changes how a pipeline draws, not its weights; expected inplace=False")
    folder = tempfile.TemporaryDirectory(prefix="sa_diffusers_") if output_dir is None else nullcontext(output_dir)
    copied = copy_pipeline(pipeline, component)
    copied.forgotten = getattr(pipeline, "forgotten", None)
    with folder as path, reporting(quiet=not progress, callback=callback):
        config.output_dir = str(Path(path).expanduser())
        forgotten = run_forgetting(config, copied).pipeline
    if inplace:  # only now, so that a run that fails leaves the caller's pipeline as it was
        take_over(modules[component], getattr(forgotten, component))
        for name in ("metrics", "pictures", "forgotten", "_repr_html_"):
            setattr(pipeline, name, getattr(forgotten, name))
        return pipeline
    forgotten.register_to_config(_name_or_path=pipeline.name_or_path)
    return forgotten


def _config_of(pipeline: DiffusionPipeline, dtype: str, options: dict[str, Any]) -> RunOptions:
    """The options of a run on a pipeline, over its kind's. Raises ValueError for another model or dtype."""
    given = layered(RunOptions, dict(find_family(type(pipeline)).defaults), options)
    config = config_from_dict(run_options.ForgetConfig, given)
    model = str(pipeline.name_or_path or type(pipeline).__name__)  # a Path where it was loaded by one
    for name, value in {"model": model, "dtype": dtype}.items():
        if name in options and getattr(config, name) != value:
            raise ValueError(f"expected no {name} beside a pipeline, whose own is {value}; got {options[name]!r}")
        setattr(config, name, value)
    return config


@usual_modes()
def run_forgetting(
    config: RunOptions, pipeline: DiffusionPipeline | None = None, merge: Merge | None = None
) -> Outcome:
    """Run every stage that the output folder does not hold yet; see `ForgetConfig` for what can be said.

    Args:
        pipeline: changed in place; None loads `config.model`.
        merge: of adapters, in the place of training.
    """
    options, state = taken_over(config.resolved()), process_state()
    method = methods.get(options.method)
    check_launch(options, shardable=method.shardable and not (options.robust_conflict or options.quantize_base))
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)

    def index() -> Mapping[str, Any]:
        if pipeline is not None:
            return dict(pipeline.config) | {"_class_name": type(pipeline)}
        check_model(options.model, options.revision, options.variant)
        return read_model_index(options.model, options.revision)

    def find_labels() -> list[str] | None:
        return list((index().get("id2label") or {}).values()) or None

    def find_tokenizer() -> PreTrainedTokenizerBase | None:
        if pipeline is not None:
            return getattr(pipeline, "tokenizer", None)
        return read_tokenizer(options.model, options.revision)

    def find_resolution() -> int:
        family = find_family(index()["_class_name"])
        methods.require(family, method.name, *method.requires)
        if pipeline is not None:
            return get_family(pipeline).resolution
        return family.resolution_of(configurations(resolve(options.model)))

    @cache
    def find_forgotten() -> list[dict[str, Any]]:
        earlier = chain_of(options.after)[-1].forgotten if options.after else None
        return earlier or getattr(pipeline, "forgotten", None) or read_forgotten(options.model, options.revision)

    if method.completes:
        inputs = read_picture_inputs(options, find_resolution)
    else:
        inputs = read_inputs(options, find_labels, find_tokenizer, find_forgotten)
    name = folder_name(inputs.concepts.name)
    output_dir = Path(options.output_dir or Path("runs") / name)
    hub_id = options.hub_model_id or f"{base_name(options.model)}-without-{name}"
    if options.push_to_hub:
        check_push(hub_id)
    with run_lock(output_dir) if state.is_main_process else nullcontext():
        started = claim_folder(output_dir) if state.is_main_process else None
        state.wait_for_everyone()
        outcome = _run(options, pipeline, inputs, output_dir, forgotten=find_forgotten(), merge=merge, started=started)
        if options.push_to_hub and state.is_main_process:
            folder = output_dir / ("lora" if options.leaves_adapter else "pipeline")
            say(f"pushed to {push_folder(folder, hub_id, private=options.hub_private)}")
    return outcome


def _run(
    options: RunOptions, pipeline: DiffusionPipeline | None, inputs: Inputs, output_dir: Path, **known: Any
) -> Outcome:
    """`known`: fields of the context."""
    bits, source = options.quantize_base, (options.model, options.revision, options.variant, options.dtype)
    pipeline = pipeline or load_pipeline(*source, trained_waits=bits is not None)
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    component = checked_family(pipeline).component
    check_plain(pipeline.components, component)
    trained = getattr(pipeline, component)
    # A caller's pipeline may lie anywhere, and accelerate trains where it chooses.
    with kept_state(parts), quantized(trained, bits), on_device(trained, process_state().device):
        family = get_family(pipeline, sampler=options.sampler, compute_dtype=compute_dtype(options.mixed_precision))
        for judge in inputs.judges.values():
            judge.classifier.require_size(family.resolution)
        context = RunContext(options, inputs, family, output_dir, **known)
        context.options = saying(options, context.requested) if options.concepts else options
        check_run(context)
        with prepared(family, options):
            context.artifacts |= {
                "model": Artifact(pipeline, pipeline_hashes(pipeline, family.component)),
                "prompts": Artifact(inputs.prompts, content_fingerprint(inputs.prompts)),
                "templates": Artifact(inputs.templates, content_fingerprint(inputs.templates)),
                "exam": Artifact(inputs.sets, exam_content(inputs)),
            }
            if inputs.pictures:
                hashes = {name: group.fingerprint for name, group in inputs.pictures.items()}
                context.artifacts["pictures"] = Artifact(inputs.pictures, hashes)
                if options.retrained:
                    context.artifacts["retrained_model"] = read_retrained(options, family)
            settle_surrogates(context)
            if not inputs.judges and not inputs.pictures:
                context.preference = preference_of(context)
            return _run_stages(context)


def _run_stages(context: RunContext) -> Outcome:
    stages = Stages(stages_of(context), context, context.options.overwrite, dict(context.spent))
    main = process_state().is_main_process
    left = [stage for stage in stages.stages if stage.name in stages.left]
    if context.preference is not None and any(isinstance(stage, EvaluateStage) for stage in left):
        context.preference.freeze(changed_names(context))
    if context.strength.kind == "scale" and any(isinstance(stage, StrengthStage | ChoiceStage) for stage in left):
        context.original = weights_in_main_memory(context.family.module)
    if main:
        plan = announce(context, stages)
        with _room_to_look(context, stages), atomic_path(context.folder / "config.yaml") as temporary:
            config_to_yaml(context.options, temporary)  # only now that no stage has refused it
        say(plan)
    for stage in stages.stages:
        if stage.name == "train":
            context.family = context.method.wrap(context)
        stages.run(stage)
    metrics = combine(context, stages)
    tell("metrics", **{name: metrics[name] for name in ("before", "after", "intervals", "seconds")})
    tell("verdict", **metrics["verdict"])
    if main:
        with _room_to_look(context, stages):
            keep_earlier(context)
            write_results(context, metrics)
    pipeline, shown = context.family.pipeline, pairs(context.value("before"), context.value(context.result))
    pipeline.metrics, pipeline.pictures = metrics, shown
    pipeline.forgotten = read_forgotten(str(context.folder / "pipeline"))
    pipeline._repr_html_ = partial(notebook_view, metrics, shown)
    return Outcome(pipeline, metrics, context.folder, commands(context, metrics))


@contextmanager
def _room_to_look(context: RunContext, stages: Stages) -> Iterator[None]:
    """Let a finished run be looked at on a full disk: what it wrote before is all there, and stays as it was."""
    try:
        yield
    except DiskFull as error:
        if stages.left or not all_written(context):
            raise
        say(f"nothing is written again: {error}")
