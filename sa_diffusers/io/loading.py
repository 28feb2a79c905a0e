"""Pipelines in and out: loaded whole, hashed, copied, saved as the stock class they were."""

import copy
import json
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from sa_diffusers.families import family_class, find_family, own_pipeline_classes
from sa_diffusers.families.plain_parts import unfused, unwrapped
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import read_back
from sa_diffusers.io.forgotten import write_forgotten
from sa_diffusers.io.hub import ModelLoadError, explain_load_errors, read_part
from sa_diffusers.io.model_names import is_on_hub
from sa_diffusers.io.processes import process_state
from sa_diffusers.models.quantization import original_state
from sa_diffusers.models.single_file import (
    SUFFIXES,
    check_single_file,
    configurations,
    is_single_file,
    load_single_file,
)
from sa_diffusers.models.weight_files import check_weights, check_whole, has_variant


def read_model_index(model: str, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's model_index.json: its class, components and options. Raises ModelLoadError."""
    source = configurations(resolve(model))
    inside = Path(source) / "pipeline"
    if (inside / "model_index.json").is_file() and not (Path(source) / "model_index.json").exists():
        raise ModelLoadError(f"{model} is the folder of a run, not a pipeline; did you mean {inside}?")
    if Path(source).is_file():
        raise ModelLoadError(
            f"{model} is a file, not a pipeline; pass the folder of its model_index.json, such as "
            f"{Path(model).parent}, or one file of all weights ({', '.join(SUFFIXES)})"
        )
    with explain_load_errors(source):
        index = dict(DiffusionPipeline.load_config(source, revision=revision))
    if "_class_name" not in index:
        raise ModelLoadError(f"the model_index.json of {model} names no class; save the pipeline again")
    if isinstance(index["_class_name"], list):  # [the file beside the weights that has the class, its name]
        index["_class_name"] = index["_class_name"][1]
    return index


def read_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The (first) tokenizer of a pipeline, without its weights; None: it has none by that name."""
    kind = read_model_index(source, revision).get("tokenizer", (None, None))[1]
    if kind is None or not hasattr(transformers, kind):
        return None
    folder = configurations(resolve(source))
    with explain_load_errors(folder):
        return getattr(transformers, kind).from_pretrained(folder, subfolder="tokenizer", revision=revision)


def read_run_options(run: Path) -> dict[str, Any]:
    """What the config.yaml in a run's folder says; {} where there is none."""
    path = run / "config.yaml"
    return read_back(path) if path.is_file() else {}


def load_pipeline(
    model: str, revision: str | None, variant: str | None, dtype: str, trained_waits: bool = False
) -> DiffusionPipeline:
    """Load every component of a pipeline onto this process's device, its safety checker included.

    Args:
        model: hub id, local folder or file, or bundled/<name>; what else it is raises ModelLoadError.
        dtype: "float32", "float16" or "bfloat16".
        trained_waits: leave the part that is trained in main memory, where the device has no room for it as it is.
    """
    source = resolve(model)
    index = read_model_index(model, revision)
    if is_single_file(source):
        pipeline = load_single_file(*_single_file(source, index), getattr(torch, dtype))
    else:
        cls = own_pipeline_classes().get(index["_class_name"], DiffusionPipeline)
        # diffusers asks for parts that a pipeline was saved without, such as the T5 of Stable Diffusion 3.
        absent = {name: None for name, entry in index.items() if entry in ([None, None], (None, None))}
        half = {"dtype": getattr(torch, dtype), "low_cpu_mem_usage": False}
        with explain_load_errors(source, revision=revision):
            pipeline = cls.from_pretrained(source, revision=revision, variant=variant, **half, **absent)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and Path(source, name).is_dir():
                check_whole(part, Path(source, name), variant)
    waits = find_family(type(pipeline)).component if trained_waits else None
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name != waits:
            part.to(process_state().device)
    return pipeline


def copy_pipeline(pipeline: DiffusionPipeline, trained: str, shared: Iterable[nn.Parameter] = ()) -> DiffusionPipeline:
    """A pipeline of the same class that shares every component but its own plain copy of the one that is trained.

    Args:
        shared: weights of that one which are not copied either.
    """
    components = {name: unwrapped(part) for name, part in pipeline.components.items()}
    components[trained] = unfused(copy.deepcopy(components[trained], {id(weight): weight for weight in shared}))
    options = {k: v for k, v in pipeline.config.items() if k not in components and not k.startswith("_")}
    return type(pipeline)(**components, **options)


def model_hash(module: nn.Module) -> str:
    """Hash of a module's weights; 16 hex digits."""
    return hash_tensors(original_state(module))


def pipeline_hashes(pipeline: DiffusionPipeline, trained: str | None = None) -> dict[str, str]:
    """Hash of every component that shapes a sample; the safety checker does not, since it is never run.

    That of the trained one is the same whether it is trained itself, in float32, or lies under a LoRA in half of that.
    """
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    kept = {name: original_state(part) for name, part in sorted(modules.items()) if name != "safety_checker"}
    return {name: hash_tensors(tensors, half_as_float32=name == trained) for name, tensors in kept.items()}


def save_pipeline(
    pipeline: DiffusionPipeline,
    path: Path,
    module: nn.Module,
    dtype: str,
    variant: str | None = None,
    forgotten: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Save atomically, the trained module in `dtype` like the rest; in memory its values are rounded to it, too.

    Args:
        variant: "fp16" writes every part a second time, in float16, as `*.fp16.safetensors` beside the files in
            `dtype`, for `from_pretrained(path, variant="fp16", dtype=torch.float16)`; another one is a ValueError.
        forgotten: what the pipeline has forgotten, as `write_forgotten` takes it; of this run without hashes after.
    """
    if variant not in (None, "fp16"):
        raise ValueError(f"expected the variant fp16 or none, got {variant!r}")
    kept = module.dtype
    try:
        with atomic_path(path) as temporary:
            if dtype != "float32":
                module.to(getattr(torch, dtype))
            pipeline.save_pretrained(temporary)
            _tidy_configurations(temporary)
            if variant:
                add_variant(pipeline, temporary, variant)
            if forgotten:
                name = next(name for name, part in pipeline.components.items() if part is module)
                after = {**forgotten[-1]["before"], name: model_hash(module)}
                write_forgotten(temporary, [record | {"after": record.get("after", after)} for record in forgotten])
    finally:
        if dtype != "float32":
            module.to(kept)


def _tidy_configurations(folder: Path) -> None:
    """Take out where on this machine parts were loaded from; and have all parts load in one precision unasked.

    Without a dtype diffusers loads its own parts in float32, and transformers in what a configuration says: that of
    the files, which in float16 would end the first picture in "mat1 and mat2 must have the same dtype".
    """
    for path in (*folder.rglob("*config.json"), *folder.glob("model_index.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name != "_name_or_path" or is_on_hub(str(value))}
        if "dtype" in kept:
            kept["dtype"] = "float32"
        if kept != config:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_variant(pipeline: DiffusionPipeline, folder: Path, variant: str) -> None:
    """Write float16 copies of the weights that `folder` holds beside them, where it has none yet.

    They are read back from the files, which spares the device a second copy, and saved elsewhere first: saving them in
    place would also replace the configurations, and transformers reads the precision of the *other* files there.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and not has_variant(folder / name, variant):
            half = type(part).from_pretrained(folder / name, dtype=torch.float16)
            # By a name that `remove_leftovers` knows, should the process be killed.
            with TemporaryDirectory(prefix=f".{secrets.token_hex(4)}.", dir=folder) as scratch:
                half.save_pretrained(scratch, variant=variant)
                # What says that all is there comes last: a list of shards, or the one file.
                for file in sorted(Path(scratch).glob(f"*.{variant}*"), key=lambda file: ".index." in file.name):
                    shutil.move(file, folder / name / file.name)


def check_model(model: str, revision: str | None = None, variant: str | None = None) -> None:
    """`check_files` of a pipeline that shall be changed. Raises ModelLoadError besides: no family adapts its class."""
    try:
        find_family(read_model_index(model, revision)["_class_name"])
    except TypeError as error:
        raise ModelLoadError(f"{model}: {error}") from None
    check_files(model, variant, revision)


def check_files(model: str, variant: str | None, revision: str | None = None) -> None:
    """Check what a pipeline is made of, before its weights are read; download what a hub model lacks here.

    Raises:
        ModelLoadError: a part without weights, or a file cut off. ValueError: parts that the family cannot work with.
    """
    index, source = read_model_index(model, revision), configurations(resolve(model))
    family, parts = family_class(index["_class_name"]), {n: e for n, e in index.items() if isinstance(e, list | tuple)}

    def configuration(part: str) -> dict[str, Any]:
        kind = parts.get(part, (None, None))[1]
        known = {} if kind is None or "Tokenizer" in kind else read_part(source, part, revision)
        return known | {"_class_name": kind}

    if family:
        family.check(configuration)
    if is_single_file(resolve(model)):
        check_single_file(*_single_file(resolve(model), index))
        return
    folder = Path(source)
    if not folder.is_dir():
        cls = own_pipeline_classes().get(index["_class_name"], DiffusionPipeline)
        with explain_load_errors(source, revision=revision):
            folder = Path(cls.download(source, variant=variant, revision=revision))
    for name, entry in parts.items():
        if len(entry) == 2 and _has_weights(*entry):
            check_weights(folder / name, model, variant)


def _single_file(path: str, index: Mapping[str, Any]) -> tuple[Path, Path, Mapping[str, Any], Sequence[str]]:
    """What `models.single_file` asks of one: itself, the folder of its configurations, its index, optional parts."""
    return Path(path), Path(configurations(path)), index, find_family(index["_class_name"]).optional


def _has_weights(library: str | None, kind: str | None) -> bool:
    """Whether a part of a pipeline has weights, by the library and the class that model_index.json names."""
    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    cls = getattr(home, kind, None) if home and kind else None
    return isinstance(cls, type) and issubclass(cls, nn.Module)
