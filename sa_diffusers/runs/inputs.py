"""What a run reads and checks before anything expensive starts, and its claim to an output folder."""

from collections.abc import Callable
from pathlib import Path

from sa_diffusers.core.concepts import Concept, mentions
from sa_diffusers.data.concepts import find_concept
from sa_diffusers.data.images import image_paths, load_image
from sa_diffusers.data.prompts import concept_templates, read_labelled_prompts, read_prompts
from sa_diffusers.evaluation.forgetting import examination, labelled_classes
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.io.artifacts import Stage as Marker
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.io.atomic_files import ArtifactError, remove_leftovers
from sa_diffusers.io.processes import process_state
from sa_diffusers.runs.context import Inputs
from sa_diffusers.runs.options import RunOptions


def read_concept(options: RunOptions) -> Concept:
    """The concept, once its surrogate has been looked at.

    Raises:
        ValueError: a concept without surrogate, or a folder without usable images.
    """
    concept = find_concept(options.concept, options.surrogate, options.siblings)
    if concept.surrogate_kind == "images":
        for path in image_paths(concept.surrogate):
            load_image(path, 64)
    return concept


def read_inputs(options: RunOptions, find_labels: Callable[[], list[str] | None] = lambda: None) -> Inputs:
    """Read and check everything but the pipeline.

    Args:
        find_labels: gives the classes of a class-conditional model, which are its only prompts, or None where prompts
            are free text. Called once the concept has been checked, since it may have to ask the hub.

    Raises:
        ValueError: as `read_concept`; prompts that all name the concept; a class that the model does not have; ...
        ModelLoadError: a classifier that cannot be loaded.
    """
    concept, labels = read_concept(options), find_labels()
    prompts = (
        labels if options.replay_prompts == "labels" else read_prompts(options.replay_prompts, options.prompt_column)
    )
    if prompts is None:
        raise ValueError("replay_prompts: labels is for models with classes, and this one takes free text")
    if labels is not None:
        _check_labels(options, concept, prompts, labels)
    if all(mentions(prompt, concept.phrasings) for prompt in prompts):
        raise ValueError(
            f"every prompt of {options.replay_prompts} mentions {concept.name!r}: there is nothing to keep; pass "
            "other --replay_prompts"
        )
    classifiers, exams = {}, {}
    rows = read_labelled_prompts(options.eval_prompts) if options.eval_prompts else []
    if options.classifier and not options.eval_prompts and labels is None:
        raise ValueError("a classifier needs eval_prompts: labelled prompts for pictures that it can judge")
    for name in options.classifier:
        classifiers[name] = load_classifier(name).to(process_state().device)
        counts = (options.eval_images_concept, options.eval_images_class, options.eval_images_other)
        if labels is not None:  # every prompt has been seen, and names a class
            rows, counts = labelled_classes(classifiers[name], labels), (*counts[:2], 0)
        exams[name] = examination(classifiers[name], concept, rows, *counts, seed=options.seed)
    templates = ["{}"] if labels else concept_templates(concept, prompts, options.concept_templates)
    return Inputs(concept, prompts, templates, classifiers, exams)


def _check_labels(options: RunOptions, concept: Concept, prompts: list[str], labels: list[str]) -> None:
    """Raise ValueError where something that stands for a class of the model is none."""
    free = concept.surrogate_kind != "prompt"
    said = [("concept", [options.concept]), ("surrogate", [] if free else [concept.surrogate])]
    for what, names in [*said, ("replay prompt", prompts)]:
        unknown = [name for name in names if name not in labels]
        if unknown:
            advice = ""
            if what == "surrogate" and options.surrogate is None:
                advice = ". None was given, and this is the usual one: pass --surrogate noise, or one of its classes"
            elif what == "concept" and "," in options.concept:
                advice = ". Such a model forgets one class at a time: run again on the result for the next"
            known = ", ".join(labels)
            raise ValueError(f"the model has no class for the {what} {unknown[0]!r}; it has {known}{advice}")
    if options.latents == "drawn" and concept.surrogate_kind == "images":
        raise ValueError("a folder of images has no latents of its own: expected latents 'encoder', got 'drawn'")


FORMAT = 2  # of run folders: what their markers hold


def claim_folder(output_dir: Path) -> None:
    """Make the folder a run's, or refuse it; whether its stages fit is for these to say.

    Raises:
        StageMismatch: it holds files of something else, or a run of an older version.
    """
    claim = Marker(output_dir, "run", {"format": FORMAT})
    # A run that was killed here, or found the disk full, has left a folder of stages with none in it.
    ours = (".lock",) if list(claim.marker.parent.glob("[!.]*.json")) else (".lock", claim.marker.parent.name)
    if not claim.marker.exists() and any(path.name not in ours for path in output_dir.iterdir()):
        raise StageMismatch(f"{output_dir} holds files of something else; pass another --output_dir")
    try:
        done = claim.done
    except ArtifactError as error:
        raise StageMismatch(
            f"{output_dir} was written by an older version, or its {claim.marker} is damaged: nothing here can go on "
            "with it; its pipeline loads as ever: pass another --output_dir"
        ) from error
    remove_leftovers(output_dir)  # before anything is written: they may hold the room for it
    if not done:
        claim.finish(0.0)
