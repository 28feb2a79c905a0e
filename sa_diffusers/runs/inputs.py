"""What a run reads and checks before anything expensive starts, and its claim to an output folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sa_diffusers import methods
from sa_diffusers.core.concepts import Concept
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts import check_surrogate, find_concept
from sa_diffusers.data.images import image_paths, load_image
from sa_diffusers.data.prompts import (
    concept_templates,
    read_labelled_prompts,
    read_prompts,
    read_templates,
    within_limit,
)
from sa_diffusers.data.replay import concept_captions, spread
from sa_diffusers.evaluation.forgetting import examination, labelled_classes
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.io.artifacts import Marker, StageMismatch
from sa_diffusers.io.atomic_files import ArtifactError, remove_leftovers
from sa_diffusers.runs.context import Inputs
from sa_diffusers.runs.options import RunOptions


LOOKED_AT = 16  # pictures of each kind where no classifier judges


def read_concept(options: RunOptions) -> Concept:
    """The concept, once its surrogate has been looked at, where the method takes one.

    Raises:
        ValueError: a concept without surrogate, or a folder without usable images.
    """
    concept = find_concept(options.concept, options.surrogate, options.siblings, options.plurals)
    method = methods.get(options.method)
    if not method.favours:
        return concept
    check_surrogate(concept, method.favours_nothing)
    if concept.surrogate_kind == "images":
        for path in image_paths(concept.surrogate):
            load_image(path, 64)
    return concept


def read_inputs(
    options: RunOptions,
    find_labels: Callable[[], list[str] | None] = lambda: None,
    find_tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
) -> Inputs:
    """Read and check everything but the pipeline.

    Args:
        find_labels: gives the classes of a class-conditional model, which are its only prompts, or None where prompts
            are free text. Called once words and files have been checked, since it looks for the model.
        find_tokenizer: gives that of a model of free text, which reads so many tokens; None: no limit is known.

    Raises:
        ValueError: as `read_concept`; prompts that all name the concept; a class that the model does not have; ...
        ModelLoadError: a classifier that cannot be loaded.
    """
    concept, given = read_concept(options), options.replay_prompts
    listed = None if given == "labels" else read_prompts(given, options.prompt_column)
    fallback = read_templates(options.concept_templates)
    rows = read_labelled_prompts(options.eval_prompts) if options.eval_prompts else None
    labels = find_labels()
    prompts = labels if listed is None else listed
    if prompts is None:
        raise ValueError("replay_prompts: labels is for models with classes, and this one takes free text")
    if labels is not None:
        _check_labels(options, concept, prompts, labels)
    if all(concept.named_in(prompt) for prompt in prompts):
        raise ValueError(
            f"every prompt of {options.replay_prompts} mentions {concept.name!r}: there is nothing to keep; pass "
            "other --replay_prompts"
        )
    every = ["{}"] if labels else concept_templates(concept, prompts, fallback)
    templates = every if labels else within_limit(every, concept, find_tokenizer())
    cut = f"{len(every) - len(templates)} of {len(every)} templates left out: the text encoder does not read so far"
    notes = [cut] if len(templates) < len(every) else []
    if options.classifier:
        judges, sets = _judges_and_sets(options, concept, rows, labels)
    else:
        judges, sets = {}, _sets_to_look_at(concept, prompts, templates, options.seed)
    return Inputs(concept, prompts, templates, judges, sets, notes)


def _judges_and_sets(
    options: RunOptions, concept: Concept, rows: list[dict[str, str]] | None, labels: list[str] | None
) -> tuple[dict[str, ClassifierJudge], dict[str, PromptSet]]:
    if rows is None and labels is None:
        raise ValueError("a classifier needs labelled prompts for pictures that it can judge; pass --eval_prompts")
    judges = {name: ClassifierJudge.load(name, concept.phrasings) for name in options.classifier}
    first, *others = judges.values()
    if any((one.attribute, set(one.classes)) != (first.attribute, set(first.classes)) for one in others):
        raise ValueError("the classifiers of a run name the concept's classes differently; pass ones that agree")
    counts = [options.eval_images_concept, options.eval_images_class]
    if labels is not None:  # every prompt has been seen, and names a class
        rows, counts = labelled_classes(first, labels), [*counts, 0]
    else:
        counts.append(options.eval_images_other)
    return judges, examination(first, concept, rows, *counts, seed=options.seed)


def _sets_to_look_at(concept: Concept, prompts: list[str], templates: list[str], seed: int) -> dict[str, PromptSet]:
    asking = [caption for caption, _ in concept_captions(templates, concept, LOOKED_AT * 3, seed)]  # they are judged
    without = [prompt for prompt in prompts if not concept.named_in(prompt)]
    others = [prompt for prompt in spread(without, LOOKED_AT * 2, seed) if prompt][:LOOKED_AT]
    drawn = {"concept": ("asks", "look", asking), "retained": ("keeps", "look at others", others)}
    return {
        name: PromptSet.seeded(purpose, list(map(Candidate, texts)), partial(derive_seed, seed, what))
        for name, (purpose, what, texts) in drawn.items()
    }


def _check_labels(options: RunOptions, concept: Concept, prompts: list[str], labels: list[str]) -> None:
    """Raise ValueError where something that stands for a class of the model is none."""
    free = concept.surrogate_kind != "prompt" or not methods.get(options.method).favours
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
    ours = (".lock",) if list(claim.path.parent.glob("[!.]*.json")) else (".lock", claim.path.parent.name)
    if not claim.path.exists() and any(path.name not in ours for path in output_dir.iterdir()):
        raise StageMismatch(f"{output_dir} holds files of something else; pass another --output_dir")
    try:
        done = claim.done()
    except ArtifactError as error:
        raise StageMismatch(
            f"{output_dir} was written by an older version, or its {claim.path} is damaged: nothing here can go on "
            "with it; its pipeline loads as ever: pass another --output_dir"
        ) from error
    remove_leftovers(output_dir)  # before anything is written: they may hold the room for it
    if not done:
        claim.finish(0.0)
