"""The output folder of an evaluation: whose files it holds, and which pictures need not be drawn again."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sa_diffusers.evaluation.prompts.prompt_suite import PromptSet
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.subjects import Subject
from sa_diffusers.io.artifacts import Stage, StageMismatch, fingerprint
from sa_diffusers.io.atomic_files import remove_leftovers


RUN_FILES = ("pipeline/model_index.json", "model_index.json", "config.yaml", "attack.json")  # of a run or a pipeline


def check_output_dir(output_dir: Path) -> None:
    """Raise ValueError for a folder whose report.html would be, or is, another program's."""
    theirs = [name for name in RUN_FILES if (output_dir / name).exists()]
    ours = (output_dir / "evaluation.json").exists() or any(output_dir.glob("*/values.json"))
    if not ours and (output_dir / "report.html").exists():
        theirs.append("report.html")
    if theirs:
        raise ValueError(
            f"{output_dir} holds {' and '.join(theirs)}, so it is the folder of a run or of something else, whose "
            "report.html must not be replaced; pass another --output_dir"
        )


def prompts_key(prompts: PromptSet, config: PipelineEvaluationConfig) -> dict:
    """What decides a set's prompts, in words that say what differs, and a fingerprint of all prompts and seeds."""
    first = prompts.requests[0]
    asked = {"concept": list(config.phrasings)} if prompts.purpose == "asks" else {}
    return asked | {
        "number": len(prompts),
        "first": first.prompt,
        "first_seed": first.seed,
        "fingerprint": fingerprint({"requests": [asdict(request) for request in prompts.requests]}),
    }


def drawing_key(subject: Subject, prompts: PromptSet, config: PipelineEvaluationConfig) -> dict:
    """What decides the pictures of a set, as far as it is known before the model is loaded."""
    return {
        "class": subject.class_name,
        "settings": asdict(subject.settings),
        "dtype": config.dtype,
        "prompts": prompts_key(prompts, config),
    }


def count_pictures(
    config: PipelineEvaluationConfig, subjects: Sequence[Subject], suite: Mapping[str, PromptSet], output_dir: Path
) -> int:
    """How many pictures are there and need not be drawn again, unless a model's weights have changed.

    Raises:
        ValueError: a folder of pictures holds files of somebody else.
        StageMismatch: pictures of other prompts or settings; neither where `config.overwrite`.
    """
    there = 0
    for subject in subjects:
        for name, prompts in suite.items():
            folder = output_dir / subject.name
            stage = Stage(folder, name, drawing_key(subject, prompts, config))
            try:
                found = json.loads(stage.marker.read_text(encoding="utf-8"))["key"]
            except (FileNotFoundError, ValueError):  # a damaged one: `done` says what to do
                found = {}
            if _is_claimed(Stage(folder, name, found | stage.key), config.overwrite):
                there += len(prompts) - len(missing_pictures(folder / name, len(prompts)))
    return there


def claim(folder: Path, name: str, key: dict, overwrite: bool) -> None:
    """Mark a folder of pictures as those of a key, so that others are never taken for them; see `count_pictures`."""
    stage = Stage(folder, name, key)
    if _is_claimed(stage, overwrite):
        remove_leftovers(folder / name)
        return
    shutil.rmtree(folder / name, ignore_errors=True)  # before the marker: it must not vouch for what is left
    stage.finish(0.0)


def _is_claimed(stage: Stage, overwrite: bool) -> bool:
    """Whether the folder's pictures are those of the key; False: it is empty, or may be emptied."""
    try:
        if stage.done:
            return True
    except StageMismatch:
        if not overwrite:
            raise
        return False
    pictures = stage.output_dir / stage.name
    if pictures.exists() and not overwrite and (not pictures.is_dir() or any(pictures.iterdir())):
        raise ValueError(f"{pictures} holds files that this evaluation did not make; pass another --output_dir")
    return False


def picture_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def missing_pictures(folder: Path, count: int) -> list[int]:
    """Indices of the pictures that have not been drawn."""
    return [index for index in range(count) if not picture_path(folder, index).exists()]
