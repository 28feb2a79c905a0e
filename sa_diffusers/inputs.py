"""What a run reads and checks before anything expensive starts, and its claim to an output folder."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sa_diffusers.artifacts import Stage, StageMismatch, atomic_path
from sa_diffusers.bundled import resolve
from sa_diffusers.cli import config_to_yaml
from sa_diffusers.config import ForgetConfig
from sa_diffusers.data import image_paths, load_image
from sa_diffusers.evaluation.classifier import AttributeClassifier
from sa_diffusers.evaluation.forgetting import Examination, examination, read_labelled_prompts
from sa_diffusers.hub import explain_load_errors
from sa_diffusers.processes import process_state
from sa_diffusers.prompts import Concept, concept_templates, find_concept, is_folder, mentions, read_prompts


# Options that say how a run is watched, shared or fitted into memory, not what it computes: they may change between
# two runs in a folder. The evaluation's options are part of the evaluation's own key.
NOT_IDENTITY = (
    "overwrite", "num_threads", "push_to_hub", "hub_model_id", "hub_private", "report_to", "output_dir",
    "checkpoints_total_limit", "checkpointing_steps", "eval_batch_size", "fisher_chunk_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "classifier", "eval_prompts", "eval_images_concept",
    "eval_images_class", "eval_images_other",
)  # fmt: skip


@dataclass
class Inputs:
    """The concept, the prompts, and by the name of each classifier the classifier and the prompts it judges by."""

    concept: Concept
    prompts: list[str]
    templates: list[str]
    classifiers: dict[str, AttributeClassifier]
    exams: dict[str, Examination]


def read_inputs(config: ForgetConfig) -> Inputs:
    """Read and check everything but the pipeline.

    Raises:
        ValueError: a concept without surrogate, a folder without images, prompts that all name the concept, ...
        ModelLoadError: a classifier that cannot be loaded.
    """
    concept = find_concept(config.concept, config.surrogate, config.siblings)
    if is_folder(concept.surrogate):
        for path in image_paths(concept.surrogate):
            load_image(path, 64)
    prompts = read_prompts(config.replay_prompts, config.prompt_column)
    if all(mentions(prompt, concept.phrasings) for prompt in prompts):
        raise ValueError(
            f"every prompt of {config.replay_prompts} mentions {concept.name!r}: there is nothing to keep; pass other "
            "--replay_prompts"
        )
    classifiers, exams = {}, {}
    rows = read_labelled_prompts(config.eval_prompts) if config.eval_prompts else []
    for name in config.classifier:
        source = resolve(name)
        with explain_load_errors(source):
            classifiers[name] = AttributeClassifier.from_pretrained(source, dtype=torch.float32)
        classifiers[name].eval().to(process_state().device)
        counts = (config.eval_images_concept, config.eval_images_class, config.eval_images_other)
        exams[name] = examination(classifiers[name], concept, rows, *counts, seed=config.seed)
    return Inputs(concept, prompts, concept_templates(concept, prompts, config.concept_templates), classifiers, exams)


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
    foreign = not claim.marker.exists() and any(path.name != ".lock" for path in output_dir.iterdir())
    if foreign:
        raise StageMismatch(f"{output_dir} holds files of something else; pass another --output_dir")
    try:
        done = claim.done
    except StageMismatch:
        # Nothing was finished: the other configuration failed early, and this one may be its correction.
        finished = any(path != claim.marker for path in claim.marker.parent.iterdir())
        if finished and not config.overwrite:
            raise
        done = False
    if not done:
        claim.finish(0.0)
    with atomic_path(output_dir / "config.yaml") as temporary:
        config_to_yaml(config, temporary)
