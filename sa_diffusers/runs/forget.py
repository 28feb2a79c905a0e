"""Forget a concept: the stages in their order, from a pipeline to one that has forgotten and a page that shows it."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from sa_diffusers.evaluation.before_after import Findings
from sa_diffusers.families import Family, family_defaults, get_family
from sa_diffusers.io.artifacts import RunLock, fingerprint
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.hub import check_push, push_folder
from sa_diffusers.io.loading import copy_pipeline, load_pipeline, pipeline_hashes, read_model_index, save_pipeline
from sa_diffusers.io.model_names import base_name
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Stages
from sa_diffusers.methods.building import distils_surrogate
from sa_diffusers.models.precision import compute_dtype, in_main_memory, on_device
from sa_diffusers.runs.family_checks import check_family
from sa_diffusers.runs.inputs import Inputs, check_resolution, claim_folder, identity, read_inputs
from sa_diffusers.runs.options import DRAWS_NO_SURROGATE, SLD_METHODS, ForgetConfig
from sa_diffusers.runs.results import amounts, announce, combine, evaluation_key, examiner, write_results
from sa_diffusers.runs.sample_stages import draw_open_samples, draw_replay_samples, make_surrogate
from sa_diffusers.runs.tracking import SNAPSHOTS, tracker
from sa_diffusers.runs.train_stages import edit_of, fisher_of, forget_by_training, given_fisher, safely_guided
from sa_diffusers.training.launching import check_launch
from sa_diffusers.training.lora import fuse_lora, save_lora


@dataclass
class Outcome:
    """What a run leaves: the pipeline that has forgotten, its numbers (metrics.json), and the folder of the rest."""

    pipeline: DiffusionPipeline
    metrics: dict
    output_dir: Path


def forget(
    pipeline: DiffusionPipeline,
    concept: str,
    surrogate: str | None = None,
    *,
    inplace: bool = False,
    output_dir: str | Path | None = None,
    **options,
) -> DiffusionPipeline:
    """Make a pipeline forget a concept.

    Args:
        pipeline: a StableDiffusionPipeline, ClassConditionalPipeline or ConditionalVAEPipeline; left as it is unless
            `inplace`.
        concept: one or several phrasings of the concept, separated by commas.
        surrogate: what takes its place: a prompt, a folder of images, or "noise". None: looked up, for known concepts.
        inplace: change the given pipeline's weights instead of a copy's.
        output_dir: keeps samples, Fisher, report, ...; and resumes from them. None: a temporary folder.
        options: any field of `ForgetConfig`.

    Returns:
        A pipeline of the same class, or with method "sld-*" a `SafeGuidancePipeline`. Everything but the trained
        module is shared with the given one.

    Raises:
        TypeError: no pipeline of a class that is handled.
        ValueError: options that cannot work, before anything is computed.
    """
    component = get_family(pipeline).component  # refuses what is no pipeline, or one that cannot be handled
    if inplace and options.get("method") in SLD_METHODS:
        raise ValueError(f"{options['method']} changes how a pipeline draws, not its weights; expected inplace=False")
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    precisions = {n: modules[n].dtype for n in (component, "text_encoder") if n in modules}
    if len(set(precisions.values())) > 1:
        # transformers keeps the precision of the files, diffusers loads float32: pictures could not be drawn.
        raise ValueError(f"expected components of one precision, got {precisions}; load the pipeline with dtype=...")
    given = family_defaults(type(pipeline).__name__) | options | {"concept": concept, "surrogate": surrogate}
    config = config_from_dict(ForgetConfig, given)
    config.model = pipeline.name_or_path or type(pipeline).__name__
    config.dtype = str(modules[component].dtype).removeprefix("torch.")
    working = copy_pipeline(pipeline, component)
    folder = (
        tempfile.TemporaryDirectory(prefix="sa_diffusers_") if output_dir is None else nullcontext(str(output_dir))
    )
    with folder as path:
        config.output_dir = path
        forgotten = run_forgetting(config, working).pipeline
    if not inplace:
        return forgotten
    # Only now, so that a run that fails leaves the caller's pipeline as it was.
    modules[component].load_state_dict(getattr(forgotten, component).state_dict())
    return pipeline


def run_forgetting(config: ForgetConfig, pipeline: DiffusionPipeline | None = None) -> Outcome:
    """Run every stage that the output folder does not hold yet; see `ForgetConfig` for what can be said.

    Args:
        pipeline: changed in place; None loads `config.model`.
    """
    check_launch(config, shardable=config.lora_rank is None and "-" not in config.method)
    state = process_state()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)

    def find_labels() -> list[str] | None:
        known = read_model_index(config.model, config.revision) if pipeline is None else pipeline.config
        return list(known["id2label"].values()) if known.get("id2label") else None

    inputs = read_inputs(config, find_labels)
    name = "-".join(re.findall(r"\w+", inputs.concept.name.lower()))
    output_dir = Path(config.output_dir or Path("runs") / name)
    hub_id = config.hub_model_id or f"{base_name(config.model)}-without-{name}"
    if config.push_to_hub:
        check_push(hub_id)
    with RunLock(output_dir) if state.is_main_process else nullcontext():
        if state.is_main_process:
            claim_folder(output_dir, config)
        state.wait_for_everyone()
        outcome = _run_stages(config, pipeline, inputs, output_dir)
        if config.push_to_hub and state.is_main_process:
            folder = output_dir / ("lora" if config.lora_rank else "pipeline")
            print(f"pushed to {push_folder(folder, hub_id, private=config.hub_private)}")
    return outcome


@contextmanager
def _prepared(family: Family, config: ForgetConfig) -> Iterator[None]:
    """The trained module in float32 and as fast as was asked for, and its helpers off the device, for a while."""
    module, parts = family.module, family.pipeline.components
    if module.dtype != torch.float32:
        module.to(torch.float32)
    module.eval()
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    if config.compile_backend:
        module.compile(backend=config.compile_backend)
    helpers = [parts[name] for name in family.helpers if parts.get(name) is not None]
    with in_main_memory(helpers) if config.offload else nullcontext():
        yield
    module._compiled_call_impl = None  # torch has no public way back from Module.compile
    module.to(memory_format=torch.contiguous_format)
    if config.dtype != "float32":
        module.to(getattr(torch, config.dtype))  # the precision of the other parts, as in the saved pipeline


def _run_stages(config: ForgetConfig, pipeline: DiffusionPipeline | None, inputs: Inputs, output_dir: Path) -> Outcome:
    pipeline = pipeline or load_pipeline(config.model, config.revision, config.variant, config.dtype)
    # A caller's pipeline may lie anywhere, and accelerate trains where it chooses.
    with on_device(getattr(pipeline, get_family(pipeline).component), process_state().device):
        family = get_family(pipeline, sampler=config.sampler, compute_dtype=compute_dtype(config.mixed_precision))
        check_resolution(inputs, family.resolution)
        check_family(config, family, inputs.concept)
        with _prepared(family, config):
            pipeline, metrics = _forget(config, family, inputs, output_dir)
    return Outcome(pipeline, metrics, output_dir)


def _forget(config: ForgetConfig, family: Family, inputs: Inputs, output_dir: Path) -> tuple[DiffusionPipeline, dict]:
    """The pipeline that has forgotten, and metrics.json."""
    state, concept, pipeline = process_state(), inputs.concept, family.pipeline
    stages = Stages(output_dir, overwrite=config.overwrite)
    hashes = pipeline_hashes(pipeline)
    if state.is_main_process:
        print(announce(config, family, inputs, output_dir), flush=True)

    given = given_fisher(family, config)  # refused, if it is another model's, before anything is drawn
    edit, edit_key = edit_of(stages, family, config, concept, inputs.prompts, inputs.templates, hashes)
    samples, samples_key = None, "none"
    if config.replay_weight or (config.ewc_lambda and not config.fisher) or distils_surrogate(config, concept):
        samples, samples_key = draw_replay_samples(stages, family, config, inputs.prompts, hashes)
    replay = draw_open_samples(stages, family, config, concept, samples, samples_key) if config.replay_weight else None
    surrogate, surrogate_key = None, "none"
    if config.method not in DRAWS_NO_SURROGATE:
        surrogate, surrogate_key = make_surrogate(stages, family, config, concept, inputs.templates, hashes)
    fisher, fisher_key = None, "none"
    if config.ewc_lambda:
        fisher, fisher_key = fisher_of(stages, family, config, samples, samples_key, given)

    examine, judged_by = examiner(config, family, inputs, replay), evaluation_key(config, inputs)
    before_key = {"model": hashes, "samples": samples_key} | judged_by
    if replay is not None:  # on which its loss is measured
        words = {"phrasings": list(concept.phrasings), "siblings": list(concept.siblings)}
        before_key["replay"] = {"negative": config.replay_negative} | words
    if config.before:
        before = Findings.load(Path(config.before)).check(before_key)
        stages.reused.append("before")
    else:
        before = _examine(stages, "before", before_key, examine)
    if config.method in SLD_METHODS:
        family = safely_guided(family, config, concept)
        pipeline, examine = family.pipeline, examiner(config, family, inputs, None)
    trained_key = {
        "model": hashes,
        "samples": samples_key,
        "surrogate": surrogate_key,
        "fisher": fisher_key,
        "edit": edit_key,
        "prompts": fingerprint({"prompts": inputs.prompts}),  # replayed; the options hold the name of a file
        "options": identity(config),
    }

    def compute() -> list[dict]:
        history: list[dict] = []
        if config.method == "uce":
            edit.apply(family.module)
        elif config.method not in SLD_METHODS:
            if not any((output_dir / "checkpoints").glob("step_*")):
                shutil.rmtree(output_dir / SNAPSHOTS, ignore_errors=True)  # of what --overwrite replaces
            callback = tracker(config, family, inputs, output_dir)
            history = forget_by_training(
                stages, family, config, concept, surrogate, replay, samples, inputs.prompts, fisher, edit, callback
            )
        if state.is_main_process and config.lora_rank:
            save_lora(pipeline, output_dir / "lora", config.dtype)
        if config.lora_rank:
            fuse_lora(family.module)
        if state.is_main_process and not config.lora_rank:
            shutil.rmtree(output_dir / "lora", ignore_errors=True)  # of what --overwrite replaces
        if state.is_main_process:
            # Saved before it is judged: whatever happens there, the result is not lost.
            save_pipeline(pipeline, output_dir / "pipeline", family.module, config.dtype, config.save_variant)
            write_json(history, output_dir / "history.json")
        return history

    def load() -> list[dict]:
        part = family.component
        saved = type(family.module).from_pretrained(output_dir / "pipeline", subfolder=part, dtype=torch.float32)
        family.module.load_state_dict(saved.state_dict())
        return json.loads((output_dir / "history.json").read_text())

    history = stages.run("train", trained_key, compute, load, workspace=output_dir / "checkpoints")
    after = _examine(stages, "after", {"trained": fingerprint(trained_key)} | judged_by, examine)
    metrics = combine(inputs, before, after, stages.seconds, stages.reused)
    metrics["amounts"] = amounts(config, family, metrics, history[-1]["step"] if history else 0)
    if state.is_main_process:
        write_results(config, inputs, metrics, (before, after), history, fisher, type(pipeline).__name__, output_dir)
    return pipeline, metrics


def _examine(stages: Stages, name: str, key: dict, examine) -> Findings:
    path = stages.output_dir / "evaluation" / f"{name}.safetensors"

    def compute() -> Findings:
        findings = examine()
        findings.key = key
        if process_state().is_main_process:
            findings.save(path)
        return findings

    return stages.run(name, key, compute, lambda: Findings.load(path), counts_as="evaluate")
