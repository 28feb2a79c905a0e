"""A pipeline in one file of weights under their original names, read and written back by diffusers' converters."""

import inspect
import json
import pickle
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    fetch_diffusers_config,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sa_diffusers.io.atomic_files import atomic_path, write_json
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.io.hub import ModelLoadError


SHIPPED = "bundled/single_file"
SUFFIXES = (".safetensors", ".ckpt")
TRAINED = ("model.diffusion_model.", "joint_blocks.", "double_blocks.")  # what names of a model that draws begin with
AVERAGE = "model_ema."  # of the weights before: what is written back must not keep it
# Empty tensors that say how a model was trained, and what its scheduler is told of it; ComfyUI and A1111 read them.
MARKS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}


def is_single_file(model: str) -> bool:
    return model.endswith(SUFFIXES) and Path(model).is_file()


def configurations(model: str) -> str:
    """Where a pipeline's configurations are: of a single file the folder of its name beside it, the one that it lies
    in, what ships for its kind, or what the hub has; of all else the model itself.

    Raises:
        ModelLoadError: they are nowhere, or the file holds something else.
    """
    if not is_single_file(model):
        return model
    path = Path(model)
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "model_index.json").is_file():
            return str(folder)
    shapes = read_shapes(path)
    if not any(name.startswith(TRAINED) for name in shapes):
        raise ModelLoadError(
            f"{path} holds no pipeline under its original names ({TRAINED[0]}* or the like): it has "
            f"{min(shapes, default='nothing')!a}. `sa-diffusers convert checkpoint` puts the trained part alone into "
            "a pipeline of Stable Diffusion 1 or 2; of an adapter pass the pipeline that diffusers saves with it fused"
        )
    repo = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    if (folder := shipped(repo)) is not None:
        return folder.name
    wanted = ["*.json", "*.txt", "*.model"]
    try:
        return snapshot_download(repo, allow_patterns=wanted)
    except (LocalEntryNotFoundError, OSError, HTTPError) as error:
        patterns = " ".join(f'--include "{pattern}"' for pattern in wanted)
        raise ModelLoadError(
            f"{path} is a model like {repo}, whose configurations are not on this machine: put a folder with its "
            f"model_index.json beside the file, as {path.with_suffix('').name}/, or run `hf download {repo} "
            f"{patterns}` where there is a network"
        ) from error


@cache
def shipped(repo: str) -> TemporaryDirectory | None:
    """A folder like the hub's of one of the models whose configurations ship, without weights; None: it is no such.

    It is made once a process, and removed at its end.
    """
    given = read_yaml(f"{SHIPPED}/models.yaml")["models"].get(repo)
    if given is None:
        return None
    folder = TemporaryDirectory(prefix="sa_diffusers_")
    index = dict(given["index"])
    for name, part in given.items():
        home = Path(folder.name, name)
        if name == "index":
            continue
        if name.startswith("tokenizer"):
            shutil.copytree(resolve(f"{SHIPPED}/{part[0]}"), home)
            config = home / "tokenizer_config.json"
            said = json.loads(config.read_text(encoding="utf-8")) | {"pad_token": part[1]}
            index[name] = "transformers", said["tokenizer_class"]
        elif name.startswith("text_encoder"):
            index[name], said, config = ("transformers", part[0]), part[1], home / "config.json"
        else:
            index[name] = "diffusers", part["_class_name"]
            options = inspect.signature(getattr(diffusers, part["_class_name"])).parameters
            # diffusers' converters read a configuration as it was saved, with every default.
            said = {n: option.default for n, option in options.items() if option.default is not option.empty} | part
            config = home / ("scheduler_config.json" if name == "scheduler" else "config.json")
        write_json(said, config)
    write_json(index, Path(folder.name, "model_index.json"))
    return folder


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on "meta": nothing but shapes is read. Raises ModelLoadError."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {n: torch.empty(file.get_slice(n).get_shape(), device="meta") for n in file.keys()}  # noqa: SIM118
        content = torch.load(path, map_location="meta", weights_only=True)
        tensors = content.get("state_dict", content)
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, AttributeError) as error:
        more = "" if path.suffix == ".safetensors" else (
            ", or holds more than tensors: `sa-diffusers convert checkpoint` reads those of Stable Diffusion 1 and 2 "
            "without running anything"
        )  # fmt: skip
        raise ModelLoadError(f"{path} is damaged ({str(error).splitlines()[0]}){more}") from error


def check_single_file(path: Path, folder: Path, index: Mapping[str, Any], optional: Iterable[str]) -> list[str]:
    """The names of the parts that come from a folder, since the file lacks them.

    Args:
        index: of the pipeline.
        optional: parts that it may do without.

    Raises:
        ModelLoadError: parts that neither has, or weights of the trained part that are missing, or of other shapes.
    """
    shapes, lacking = read_shapes(path), []
    for name, kind in _modules(index).items():
        if kind.__name__ in SINGLE_FILE_LOADABLE_CLASSES and kind.__name__ != "AutoencoderKL":
            with torch.device("meta"):
                module = kind.from_config(kind.load_config(str(folder), subfolder=name))
            _check_trained(path, shapes, module)
        elif not _holds(kind, shapes):
            lacking.append(name)
    absent = [name for name in lacking if _weights(path, folder, name) is None and name not in optional]
    if absent:
        raise ModelLoadError(
            f"{path} has no weights for {' and '.join(absent)}; put the model's own folder of them beside it, as "
            f"{path.with_suffix('') / absent[0]}"
        )
    return lacking


def load_single_file(
    path: Path, folder: Path, index: Mapping[str, Any], optional: Iterable[str], dtype: torch.dtype
) -> DiffusionPipeline:
    """The pipeline of a file, with what it lacks from the folder of its configurations. Raises as the check.

    Where the file is marked as of a model that predicts v, its scheduler is so, whatever its configuration says.
    """
    parts: dict[str, Any] = {n: None for n, entry in index.items() if entry in ([None, None], (None, None))}
    for name in check_single_file(path, folder, index, optional):
        if home := _weights(path, folder, name):
            parts[name] = _modules(index)[name].from_pretrained(home, dtype=dtype)
        else:
            parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    cls = getattr(diffusers, index["_class_name"])
    pipeline = cls.from_single_file(str(path), config=str(folder), dtype=dtype, local_files_only=True, **parts)
    if (marked := _marked(path)) and "prediction_type" in pipeline.scheduler.config:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **marked)
    return pipeline


def _marked(path: Path) -> dict[str, Any]:
    """What the scheduler is told by a file's marks, or the metadata that trainers write (modelspec)."""
    shapes = read_shapes(path)
    found = dict(told for mark, told in MARKS.items() if mark in shapes)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("modelspec.prediction_type") == "v":
                found |= dict([MARKS["v_pred"]])
    return found


def save_single_file(source: Path, module: nn.Module, path: Path, scheduler: Mapping[str, Any]) -> None:
    """Write a single file again in float16, under its own names, with the weights that `module` has now.

    Args:
        scheduler: its configuration; of a model that predicts v the file is marked as such.
    """
    given = load_single_file_checkpoint(str(source))
    given = {name: t for name, t in given.items() if isinstance(t, Tensor) and not name.startswith(AVERAGE)}
    tensors = {n: t.to(torch.float16 if t.is_floating_point() else t.dtype, copy=True) for n, t in given.items()}
    weights, rows = module.state_dict(), rows_of(tensors, type(module), module.config)
    for name, (original, places) in rows.items():
        values = weights[name].detach().to("cpu", tensors[original].dtype)
        tensors[original].view(len(tensors[original]), -1)[places] = values.reshape(len(places), -1)
    if scheduler.get("prediction_type") == "v_prediction":
        tensors |= {mark: torch.empty(0) for mark, (name, value) in MARKS.items() if scheduler.get(name) == value}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def rows_of(tensors: Mapping[str, Tensor], kind: type[nn.Module], config: Any) -> dict[str, tuple[str, Tensor]]:
    """Where the weights of a module are in a single file: by their name, the original one and the rows of that tensor.

    diffusers' converters rename, split and swap rows. Given the numbers of the rows in their place, they tell.
    """
    numbered, starts, total = {}, [], 0
    for name, tensor in tensors.items():
        count = len(tensor) if tensor.dim() else 1
        numbered[name] = torch.arange(total, total + count).view(-1, *[1] * (tensor.dim() - 1))
        starts.append(total)
        total += count
    originals = list(numbered)
    found = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"](checkpoint=numbered, config=config)
    rows = {name: places.flatten() for name, places in found.items() if places is not None}
    owners = {name: int(torch.searchsorted(torch.tensor(starts), places.min(), right=True)) - 1
              for name, places in rows.items()}  # fmt: skip
    return {name: (originals[owners[name]], places - starts[owners[name]]) for name, places in rows.items()}


def _modules(index: Mapping[str, Any]) -> dict[str, type[nn.Module]]:
    """The classes of a pipeline's parts that have weights, but for those that only check or look at pictures."""
    homes = {"diffusers": diffusers, "transformers": transformers}
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0] in homes}
    kinds = {name: getattr(homes[library], kind) for name, (library, kind) in entries.items()}
    return {name: kind for name, kind in kinds.items() if issubclass(kind, nn.Module) and name != "image_encoder"}


def _weights(path: Path, folder: Path, name: str) -> Path | None:
    """The folder of a part that a file lacks: in that of its name beside it, or of its configurations."""
    homes = (path.with_suffix("") / name, folder / name)
    return next((home for home in homes if any(home.glob("*.safetensors"))), None)


def _holds(kind: type[nn.Module], shapes: Mapping[str, Tensor]) -> bool:
    if kind.__name__ == "AutoencoderKL":
        return any(name.startswith(("first_stage_model.", "vae.")) for name in shapes)
    return is_clip_model_in_single_file(kind, shapes) or ("T5" in kind.__name__ and is_t5_in_single_file(shapes))


def _check_trained(path: Path, shapes: Mapping[str, Tensor], module: nn.Module) -> None:
    kind = type(module).__name__
    try:
        found = rows_of(shapes, type(module), module.config)
    except (KeyError, IndexError, RuntimeError) as error:  # converters take some names and sizes for granted
        wrong = error if isinstance(error, RuntimeError) else f"it lacks {error}"
        raise ModelLoadError(f"{path} is no {kind}: {wrong}") from error
    for name, tensor in module.state_dict().items():
        original, places = found.get(name, (None, ()))
        if original is None or len(places) * shapes[original][:1].numel() != tensor.numel():
            got = f"{original} {tuple(shapes[original].shape)}" if original else "nothing"
            raise ModelLoadError(
                f"{path} is no {kind} of its configurations: expected {tuple(tensor.shape)} for {name}, got {got}. "
                "Put those of the model that it was made from beside it"
            )
