"""What a run reads and checks before anything expensive starts, and its claim to an output folder."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sa_diffusers import methods
from sa_diffusers.core.concepts import Concepts, mentions
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts.candidates import forgotten_besides, phrasings_of, tries
from sa_diffusers.data.concepts.lists import Rows, concepts_of
from sa_diffusers.data.images import image_paths, load_image
from sa_diffusers.data.prompts import (
    concept_templates,
    read_labelled_prompts,
    read_prompts,
    read_templates,
    within_limit,
)
from sa_diffusers.data.replay import concept_captions, spread
from sa_diffusers.evaluation.examination import examination, labelled_classes
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.io.artifacts import Marker, StageMismatch
from sa_diffusers.io.atomic_files import ArtifactError, remove_leftovers
from sa_diffusers.io.forgotten import said_of
from sa_diffusers.runs.chain import chain_of, rows_of
from sa_diffusers.runs.context import Inputs
from sa_diffusers.runs.options import RunOptions
from sa_diffusers.runs.stages.auto import check_auto


LOOKED_AT = 16  # pictures of each kind where no classifier judges


def read_concepts(options: RunOptions) -> Concepts:
    """The concepts, those of earlier requests first, with surrogates that are looked at where the method takes such.

    Raises:
        ValueError: as `chain_of`, `concepts_of` and, of a file, `read_rows`; a folder without usable images.
    """
    rows = [*(row for link in chain_of(options.after) for row in link.rows), *_own_rows(options)]
    method = methods.get(options.method)
    concepts = concepts_of(rows, options.plurals, method.favours, method.favours_nothing)
    if method.favours and concepts.surrogate_kind == "images":
        for path in (path for one in concepts for path in image_paths(one.surrogate)):
            load_image(path, 64)
    if "surrogate" in method.needs(options, concepts) and options.num_surrogate_samples < len(concepts):
        raise ValueError(
            f"expected a surrogate sample for each of {len(concepts)} concepts, got num_surrogate_samples "
            f"{options.num_surrogate_samples}; pass more"
        )
    return concepts


def _own_rows(options: RunOptions) -> Rows:
    return rows_of(options.concepts, options.concept, options.surrogate, options.siblings)


def read_inputs(
    options: RunOptions,
    find_labels: Callable[[], list[str] | None] = lambda: None,
    find_tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
    find_forgotten: Callable[[], Sequence[Mapping[str, Any]]] = lambda: (),
) -> Inputs:
    """Read and check everything but the pipeline.

    Args:
        find_labels: gives the classes of a class-conditional model, which are its only prompts, or None where prompts
            are free text. Called once words and files have been checked, since it looks for the model.
        find_tokenizer: gives that of a model of free text, which reads so many tokens; None: no limit is known.
        find_forgotten: gives what the model has forgotten before, as `read_forgotten`. What no chain goes on from is
            replayed as the model draws it now, which keeps it forgotten, and counts for nothing that is retained.

    Raises:
        ValueError: as `read_concepts`; a surrogate that the model itself has forgotten; prompts that all name the
            concept; a class that the model does not have; ...
        ModelLoadError: a classifier that cannot be loaded.
    """
    concepts, given = read_concepts(options), options.replay_prompts
    listed = None if given == "labels" else read_prompts(given, options.prompt_column)
    fallback = read_templates(options.concept_templates)
    rows = read_labelled_prompts(options.eval_prompts) if options.eval_prompts else None
    labels, before = find_labels(), find_forgotten()
    requested = Concepts(concepts[-len(_own_rows(options)) :])
    _check_surrogates(options, requested, before)
    gone = forgotten_besides((record["concept"] for record in before), concepts)
    check_auto(concepts, methods.get(options.method), options.quantize_base)
    prompts = labels if listed is None else listed
    if prompts is None:
        raise ValueError("replay_prompts: labels is for models with classes, and this one takes free text")
    if labels is not None:
        _check_labels(options, concepts, prompts, labels)
    if all(concepts.named_in(prompt) for prompt in prompts):
        raise ValueError(
            f"every prompt of {options.replay_prompts} mentions {concepts.name!r}: there is nothing to keep; pass "
            "other --replay_prompts"
        )
    templates, notes, tokenizer = [["{}"] for _ in concepts], [], None if labels else find_tokenizer()
    for i, concept in enumerate(() if labels else concepts):
        every = concept_templates(concept, prompts, fallback)
        templates[i] = within_limit(every, concept, tokenizer)
        if cut := len(every) - len(templates[i]):
            notes.append(f"{cut} of {len(every)} templates left out: the text encoder does not read so far")
    if options.classifier:
        judges, sets = _judges_and_sets(options, concepts, rows, labels, gone)
    else:
        judges, sets = {}, sets_to_look_at(concepts, prompts, templates, options.seed, gone)
    return Inputs(concepts, prompts, templates, judges, sets, notes, requested=len(requested))


def _check_surrogates(options: RunOptions, concepts: Concepts, forgotten: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a surrogate is something that the model has forgotten: pictures of it show another."""
    if not methods.get(options.method).favours or concepts.surrogate_kind != "prompt":
        return
    faults = [
        f"the surrogate {one.surrogate!r} was itself forgotten by this model: {said_of(record)}; pass another"
        for one in concepts
        for record in forgotten
        if mentions(one.surrogate or "", phrasings_of([record["concept"]]), options.plurals)
    ]
    if faults:
        raise ValueError("\n".join(faults))


def _judges_and_sets(
    options: RunOptions,
    concepts: Concepts,
    rows: list[dict[str, str]] | None,
    labels: list[str] | None,
    forgotten: Sequence[str],
) -> tuple[dict[str, ClassifierJudge], dict[str, PromptSet]]:
    if rows is None and labels is None:
        raise ValueError("a classifier needs labelled prompts for pictures that it can judge; pass --eval_prompts")
    judges = {name: ClassifierJudge.load(name, *(one.phrasings for one in concepts)) for name in options.classifier}
    first, *others = judges.values()
    if any(one.known != first.known for one in others):
        raise ValueError("the classifiers of a run name the concept's classes differently; pass ones that agree")
    counts = [options.eval_images_concept, options.eval_images_class]
    if labels is not None:  # every prompt has been seen, and names a class
        rows, counts = labelled_classes(first, labels), [*counts, 0]
    else:
        counts.append(options.eval_images_other)
    return judges, examination(first, concepts, rows, *counts, seed=options.seed, forgotten=forgotten)


def sets_to_look_at(
    concepts: Concepts, prompts: list[str], templates: list[list[str]], seed: int, forgotten: Sequence[str] = ()
) -> dict[str, PromptSet]:
    """Without a classifier; no prompt names what the model has `forgotten` besides."""
    captions = concept_captions(templates, concepts, LOOKED_AT * 3 * len(concepts), seed)  # they are judged
    asking = [Candidate(caption, word=one.name) for caption, _, one in captions]
    plurals = concepts[0].plurals
    without = [one for one in prompts if not (concepts.named_in(one) or mentions(one, forgotten, plurals))]
    others = [Candidate(prompt) for prompt in spread(without, LOOKED_AT * 2, seed) if prompt][:LOOKED_AT]
    drawn = {"concept": ("asks", "look", asking), "retained": ("keeps", "look at others", others)}
    return {
        name: PromptSet.seeded(purpose, candidates, partial(derive_seed, seed, what))
        for name, (purpose, what, candidates) in drawn.items()
    }


def _check_labels(options: RunOptions, concepts: Concepts, prompts: list[str], labels: list[str]) -> None:
    """Raise ValueError where something that stands for a class of the model is none."""
    free = concepts.surrogate_kind != "prompt" or not methods.get(options.method).favours
    said = [("concept", [one.said for one in concepts])]
    said.append(("surrogate", [] if free else [one.surrogate for one in concepts if not tries(one.surrogate)]))
    for what, names in [*said, ("replay prompt", prompts)]:
        unknown = [name for name in names if name not in labels]
        if unknown:
            advice = ""
            if what == "surrogate" and not (options.surrogate or options.concepts):
                advice = ". None was given, and this is the usual one: pass --surrogate noise, or one of its classes"
            elif what == "concept" and "," in unknown[0]:
                advice = ". A class has one name: repeat --concept for several, each with its --surrogate"
            known = ", ".join(labels)
            raise ValueError(f"the model has no class for the {what} {unknown[0]!r}; it has {known}{advice}")
    if options.latents == "drawn" and concepts.surrogate_kind == "images":
        raise ValueError("a folder of images has no latents of its own: expected latents 'encoder', got 'drawn'")


FORMAT = 2  # of run folders: what their markers hold


def claim_folder(output_dir: Path) -> str | None:
    """Make the folder a run's, or refuse it; whether its stages fit is for these to say.

    Returns:
        The day that it was first made one, by UTC, as 2026-01-31: the same however often the run is stopped and goes
        on. None for older ones.

    Raises:
        StageMismatch: it holds files of something else, or a run of an older version.
    """
    claim = Marker(output_dir, "run", {"format": FORMAT})
    claim.refuse_others()
    try:
        done = claim.done()
    except ArtifactError as error:
        raise StageMismatch(
            f"{output_dir} was written by an older version, or its {claim.path} is damaged: nothing here can go on "
            "with it; its pipeline loads as ever: pass another --output_dir"
        ) from error
    remove_leftovers(output_dir)  # before anything is written: they may hold the room for it
    if not done:
        claim.finish(0.0, info={"started": datetime.now(UTC).date().isoformat()})
    return claim.info.get("started")
