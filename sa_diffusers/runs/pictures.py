"""What a run reads that makes a model forget pictures: groups of them, to forget, to retain, to compare with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.concepts.lists import split_list
from sa_diffusers.data.picture_groups import PictureGroup, check_apart, check_unseen, read_group
from sa_diffusers.evaluation.completion import JUDGED
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import Family, family_class, get_family
from sa_diffusers.io.loading import load_pipeline, pipeline_hashes, read_model_index
from sa_diffusers.io.stages import Artifact
from sa_diffusers.methods.stand_ins import KINDS
from sa_diffusers.runs.context import Inputs
from sa_diffusers.runs.options import RunOptions


def check_pictures(options: RunOptions) -> None:
    """Raise ValueError where pictures, or a surrogate for them, are missing; before anything is loaded."""
    if options.forget_images is None:
        raise ValueError("expected pictures to forget, got none; pass --forget_images, as a folder or mnist:2,5")
    if options.concepts or options.after or len(split_list(options.concept)) > 1:
        raise ValueError(
            "pictures are forgotten one group a run; expected one --concept, which names it, and no --after"
        )
    if options.retain_images is None and not options.ewc_lambda:
        raise ValueError("nothing would hold the rest; pass --retain_images, or --ewc_lambda")
    if options.ewc_lambda and not (options.fisher or options.fisher_images or options.retain_images):
        raise ValueError("the Fisher needs pictures; pass --retain_images, --fisher_images, or --fisher")
    surrogate = options.surrogate or "noise"
    if surrogate not in KINDS and not ("/" in surrogate and Path(surrogate).is_dir()):
        raise ValueError(f"expected the surrogate {', '.join(KINDS)} or a folder (./pictures), got {surrogate!r}")
    if len(options.classifier) > 1:
        raise ValueError(f"pictures are read by one classifier, got {', '.join(options.classifier)}; omit the others")
    if not options.masks or not options.eval_masks:
        raise ValueError("expected a mask to forget under and one to judge by, got none")


def read_picture_inputs(options: RunOptions, find_resolution: Callable[[], int]) -> Inputs:
    """Read and check the pictures.

    Args:
        find_resolution: gives the height and width of the model's pictures.

    Raises:
        ValueError, ModelLoadError: as `read_group` and `check_apart`; a class that a classifier does not know.
    """
    check_pictures(options)
    size, counts = find_resolution(), (options.images_class, options.eval_images_class)
    groups: dict[str, PictureGroup] = {}
    for name in (*JUDGED, "fisher"):
        if spec := getattr(options, f"{name}_images"):
            groups[name] = read_group(spec, f"{name}_images", size, counts, judged=name in JUDGED)
    check_apart({name: groups[name] for name in JUDGED if name in groups})
    concept = find_concept(options.concept or groups["forget"].name, options.surrogate or "noise")
    concept = replace(concept, phrasings=(concept.said,))  # a name of them all: no prompt has any
    if concept.surrogate_kind == "images":
        groups["surrogate"] = read_group(concept.surrogate, "surrogate", size, counts, judged=False)
    for name in ("fisher", "surrogate"):  # else what is to be forgotten would be held, or forgotten towards itself
        check_apart({part: groups[part] for part in ("forget", name) if part in groups})
        if name in groups:
            check_unseen(name, groups[name], {part: groups[part] for part in JUDGED if part in groups})
    known = [one for name in JUDGED if name in groups for one in groups[name].classes]
    judges = {source: ClassifierJudge.load(source, known[:1]) for source in options.classifier}
    for judge in judges.values():
        for name in known:
            judge.classifier.require_class([name])
    return Inputs(Concepts([concept]), [], [["{}"]], judges, {}, pictures=groups)


def read_retrained(options: RunOptions, family: Family) -> Artifact[Family]:
    """The model that was trained without what is forgotten, beside `family`, which is to forget it.

    Raises:
        ModelLoadError: there is none. ValueError: its family, size, channels or patches are others.
    """
    source = options.retrained
    kind = read_model_index(source)["_class_name"]
    if family_class(kind) is not type(family):
        raise ValueError(f"retrained: expected a {type(family.pipeline).__name__} as the model is, got {kind}")
    pipeline = load_pipeline(source, None, None, "float32")
    found, hole = get_family(pipeline, sampler=options.sampler), [Condition(mask=options.eval_masks[0])]
    if found.latent_shape != family.latent_shape or not found.holes(hole).equal(family.holes(hole)):
        raise ValueError(
            f"retrained: expected a model of {family.latent_shape} with the same holes as --model has, got "
            f"{found.latent_shape} of {source}; train it by the same settings"
        )
    return Artifact(found, pipeline_hashes(pipeline, found.component))
