"""What a run reads that makes a model forget pictures: groups of them, to forget, to retain, to compare with."""

from collections.abc import Callable

from sa_diffusers.data.concepts import find_concept
from sa_diffusers.data.picture_groups import PictureGroup, check_apart, read_group
from sa_diffusers.evaluation.completion import JUDGED
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.runs.context import Inputs
from sa_diffusers.runs.options import RunOptions


def read_picture_inputs(options: RunOptions, find_resolution: Callable[[], int]) -> Inputs:
    """Read and check the pictures.

    Args:
        find_resolution: gives the height and width of the model's pictures.

    Raises:
        ValueError, ModelLoadError: as `read_group` and `check_apart`; a class that a classifier does not know.
    """
    size, counts = find_resolution(), (options.images_class, options.eval_images_class)
    groups: dict[str, PictureGroup] = {}
    for name in (*JUDGED, "fisher"):
        if spec := getattr(options, f"{name}_images"):
            groups[name] = read_group(spec, f"{name}_images", size, counts)
    check_apart([groups[name] for name in JUDGED if name in groups])
    concept = find_concept(options.concept or groups["forget"].name, options.surrogate)
    if concept.surrogate_kind == "images":
        groups["surrogate"] = read_group(concept.surrogate, "surrogate", size, counts)
    judges = {}
    for source in options.classifier:
        for name in JUDGED:
            for known in groups[name].classes if name in groups else ():
                judge = ClassifierJudge.load(source, [known])
                judges.setdefault(source, judge)
    return Inputs(concept, [], ["{}"], judges, {}, pictures=groups)
