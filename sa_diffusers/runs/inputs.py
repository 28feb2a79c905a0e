"""What a run reads and checks before anything expensive starts, and its claim to an output folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sa_diffusers.data.images import image_paths, load_image
from sa_diffusers.data.prompts import Concept, concept_templates, find_concept, is_folder, mentions, read_prompts
from sa_diffusers.evaluation.forgetting import Examination, examination, labelled_classes, read_labelled_prompts
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.artifacts import Stage, StageMismatch
from sa_diffusers.io.atomic_files import atomic_path, remove_leftovers
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import config_to_yaml
from sa_diffusers.io.hub import explain_load_errors
from sa_diffusers.io.processes import process_state
from sa_diffusers.runs.options import ForgetConfig


# Options that say how a run is watched, shared or fitted into memory, not what it computes: they may change between
# two runs in a folder. The evaluation's options are part of the evaluation's own key.
NOT_IDENTITY = (
    "overwrite", "num_threads", "push_to_hub", "hub_model_id", "hub_private", "report_to", "output_dir",
    "checkpoints_total_limit", "checkpointing_steps", "eval_batch_size", "fisher_chunk_size", "fisher_device",
    "ewc_device", "compile_backend", "channels_last", "offload",
    "gradient_accumulation_steps", "gradient_checkpointing", "classifier", "eval_prompts", "eval_images_concept",
    "eval_images_class", "eval_images_other",
)  # fmt: skip


@dataclass
class Inputs:
    """The concept, the prompts, and by the name of each classifier the classifier and the prompts it judges by."""

    concept: Concept
    prompts: list[str]
    templates: list[str]
    classifiers: dict[str, ImageClassifier]
    exams: dict[str, Examination]


def read_concept(config: ForgetConfig) -> Concept:
    """The concept, once its surrogate has been looked at.

    Raises:
        ValueError: a concept without surrogate, or a folder without usable images.
    """
    concept = find_concept(config.concept, config.surrogate, config.siblings)
    if is_folder(concept.surrogate):
        for path in image_paths(concept.surrogate):
            load_image(path, 64)
    return concept


def read_inputs(config: ForgetConfig, find_labels: Callable[[], list[str] | None] = lambda: None) -> Inputs:
    """Read and check everything but the pipeline.

    Args:
        find_labels: gives the classes of a class-conditional model, which are its only prompts, or None where prompts
            are free text. Called once the concept has been checked, since it may have to ask the hub.

    Raises:
        ValueError: as `read_concept`; prompts that all name the concept; a class that the model does not have; ...
        ModelLoadError: a classifier that cannot be loaded.
    """
    concept, labels = read_concept(config), find_labels()
    prompts = (
        labels if config.replay_prompts == "labels" else read_prompts(config.replay_prompts, config.prompt_column)
    )
    if prompts is None:
        raise ValueError("replay_prompts: labels is for models with classes, and this one takes free text")
    if labels is not None:
        _check_labels(config, concept, prompts, labels)
    if all(mentions(prompt, concept.phrasings) for prompt in prompts):
        raise ValueError(
            f"every prompt of {config.replay_prompts} mentions {concept.name!r}: there is nothing to keep; pass other "
            "--replay_prompts"
        )
    classifiers, exams = {}, {}
    rows = read_labelled_prompts(config.eval_prompts) if config.eval_prompts else []
    if config.classifier and not config.eval_prompts and labels is None:
        raise ValueError("a classifier needs eval_prompts: labelled prompts for pictures that it can judge")
    for name in config.classifier:
        source = resolve(name)
        with explain_load_errors(source):
            classifiers[name] = load_classifier(source)
        classifiers[name].eval().to(process_state().device)
        counts = (config.eval_images_concept, config.eval_images_class, config.eval_images_other)
        if labels is not None:  # every prompt has been seen, and names a class
            rows, counts = labelled_classes(classifiers[name], labels), (*counts[:2], 0)
        exams[name] = examination(classifiers[name], concept, rows, *counts, seed=config.seed)
    templates = ["{}"] if labels else concept_templates(concept, prompts, config.concept_templates)
    return Inputs(concept, prompts, templates, classifiers, exams)


def _check_labels(config: ForgetConfig, concept: Concept, prompts: list[str], labels: list[str]) -> None:
    """Raise ValueError where something that stands for a class of the model is none."""
    free = concept.surrogate == "noise" or is_folder(concept.surrogate)
    said = [("concept", [config.concept]), ("surrogate", [] if free else [concept.surrogate])]
    for what, names in [*said, ("replay prompt", prompts)]:
        unknown = [name for name in names if name not in labels]
        if unknown:
            advice = ""
            if what == "surrogate" and config.surrogate is None:
                advice = ". None was given, and this is the usual one: pass --surrogate noise, or one of its classes"
            elif what == "concept" and "," in config.concept:
                advice = ". Such a model forgets one class at a time: run again on the result for the next"
            known = ", ".join(labels)
            raise ValueError(f"the model has no class for the {what} {unknown[0]!r}; it has {known}{advice}")
    if config.latents == "drawn" and is_folder(concept.surrogate):
        raise ValueError("a folder of images has no latents of its own: expected latents 'encoder', got 'drawn'")


def check_resolution(inputs: Inputs, resolution: int) -> None:
    """Raise ValueError where a classifier cannot read pictures of the model's size (pixels a side)."""
    for name, classifier in inputs.classifiers.items():
        if classifier.config.image_size != resolution:
            raise ValueError(
                f"the classifier {name} reads pictures of {classifier.config.image_size} pixels, the model draws "
                f"{resolution}; pass another --classifier or none"
            )


def identity(config: ForgetConfig) -> dict:
    """The options that decide what a run computes."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}


def claim_folder(output_dir: Path, config: ForgetConfig) -> None:
    """Make the folder this configuration's, or refuse it.

    Raises:
        StageMismatch: it holds files of something else; or finished stages of another configuration, and overwrite is
            not set.
    """
    claim = Stage(output_dir, "run", identity(config))
    stages = claim.marker.parent
    markers = list(stages.glob("[!.]*.json"))
    # A run that was killed here, or found the disk full, has left a folder of stages with none in it.
    ours = (".lock",) if markers else (".lock", stages.name)
    foreign = not claim.marker.exists() and any(path.name not in ours for path in output_dir.iterdir())
    if foreign:
        raise StageMismatch(f"{output_dir} holds files of something else; pass another --output_dir")
    try:
        done = claim.done
    except StageMismatch:
        # Nothing was finished: the other configuration failed early, and this one may be its correction.
        finished = any(path != claim.marker for path in markers)
        if finished and not config.overwrite:
            raise
        done = False
    remove_leftovers(output_dir)  # before anything is written: they may hold the room for it
    if not done:
        claim.finish(0.0)
    with atomic_path(output_dir / "config.yaml") as temporary:
        config_to_yaml(config, temporary)
