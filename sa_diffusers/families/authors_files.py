"""Import the authors' Stable Diffusion files: their Fisher, and checkpoints with CompVis's or diffusers' names.

What such a file belongs to is not in it, so a pipeline says so. The authors took the Fisher of, and went on training,
the *raw* weights of sd-v1-4-full-ema.ckpt, while they sample from its EMA weights. Their class-conditional checkpoints
(names that start with `module.`) are not imported: no UNet of diffusers computes that network.
"""

from collections import Counter
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from sa_diffusers.core.fisher import Fisher
from sa_diffusers.families.base import Family, get_family
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.io.hub import provenance
from sa_diffusers.io.loading import load_pipeline, model_hash, read_model_index
from sa_diffusers.io.restricted_pickle import Placeholder, RefusedTensor, read_restricted


# Theirs is the squared gradient of the sum over all 1,000 timesteps of a mean over latents (Selective Amnesia, Eq. 5).
NUM_TIMESTEPS = 1000
UNET, EMA = "model.diffusion_model.", "model_ema."
KEPT = "kept"
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")


class ConversionError(ValueError):
    """A file does not hold what the pipeline's UNet needs."""


def import_fisher(path: str | Path, model: str) -> tuple[Fisher, list[str]]:
    """The authors' Fisher, a pickled dict of tensors named diffusion_model.*, under diffusers' names.

    Args:
        model: the pipeline that the Fisher is of; folder or hub id.

    Returns:
        A Fisher that a run on `model` accepts, and the globals that the file names and that were not imported.

    Raises:
        ConversionError: tensors of other names, shapes or values than a Fisher of this UNet has; or another model.
        RefusedFile, FileNotFoundError: as `read_restricted`.
    """
    _check_class(model)
    tensors, dropped = _read_tensors(path)
    tensors = {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in tensors.items()}
    family = _load(model)
    terms, prediction = family.loss.num_terms, family.loss.prediction_type
    if (terms, prediction) != (NUM_TIMESTEPS, "epsilon"):
        raise ConversionError(
            f"the authors' Fisher is of a model that predicts epsilon in {NUM_TIMESTEPS} timesteps; {model} predicts "
            f"{prediction} in {terms}; pass the pipeline that it was made of"
        )
    converted = {name: tensor.float() for name, tensor in rename_unet(tensors, family.module).items()}
    _check_values(converted, "Fisher", lowest=0.0)
    metadata = {
        "model_hash": model_hash(family.module),
        "reduction": family.loss.reduction,
        "num_terms": terms,
        "prediction_type": prediction,
        "terms": "all",
        "estimator": "every timestep",
        **provenance(model, None),
        "source": f"imported from {Path(path).name}, a file of the authors' code",
        "values": hash_tensors(converted),  # runs tell Fishers apart by their metadata
    }
    return Fisher(converted, metadata), dropped


def import_checkpoint(path: str | Path, model: str, ema: bool) -> tuple[DiffusionPipeline, Counter, list[str]]:
    """A pipeline whose UNet has the weights of a checkpoint; every other part stays the base pipeline's.

    Args:
        path: a .safetensors file, or one of torch.save's, maybe with a "state_dict". Its tensors have CompVis's names,
            all of them, with or without the leading "model."; or diffusers' names, maybe after "unet.". Of these some
            are enough, as of an edit of cross-attention: the rest stays the base pipeline's.
        model: the base pipeline; folder or hub id.
        ema: take the moving average of the weights, which the authors sample from, in place of the weights.

    Returns:
        The pipeline; the number of the file's tensors that were left out, by the first part of their names, and under
        KEPT that of the UNet's that were not in it; and the globals that it names and that were not imported.
        Raises as `import_fisher`.
    """
    _check_class(model)
    tensors, dropped = _read_tensors(path)
    tensors = {f"model.{name}" if name.startswith(UNET[6:]) else name: tensor for name, tensor in tensors.items()}
    taken = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    if ema:
        taken = _moving_average(tensors, taken)
    family = _load(model)
    if taken:
        converted = rename_unet(taken, family.module)
        used = [name for name in tensors if name.startswith((UNET, EMA) if ema else UNET)]
    else:
        converted, used = _named_as_ours(tensors, family.module)
    if not converted:
        raise ConversionError(
            f"{path} has no tensor of a UNet, {UNET}* as CompVis's or {next(iter(family.module.state_dict()))} as "
            f"diffusers'; it has {_first(list(tensors))}"
        )
    _check_values(converted, "checkpoint", lowest=-torch.inf)
    kept = family.module.load_state_dict(converted, strict=False).missing_keys
    ignored = Counter(name.split(".")[0] for name in tensors.keys() - set(used))
    return family.pipeline, ignored + Counter({KEPT: len(kept)}), dropped


def rename_unet(tensors: dict[str, Tensor], unet: nn.Module) -> dict[str, Tensor]:
    """Tensors named model.diffusion_model.*, as CompVis does, by the names of the parameters of diffusers' UNet.

    Raises:
        ConversionError: listing what is missing, what fits nowhere, and what has another shape.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint  # takes seconds

    expected = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    # diffusers' converter moves values about and drops what it does not know. Given the names as values, it tells.
    try:
        origin = convert_ldm_unet_checkpoint({name: name for name in tensors}, unet.config)
    except KeyError as error:  # it takes some names for granted once it has seen others
        raise ConversionError(f"the file has no tensor {UNET}{error.args[0]}") from error
    origin = {name: given for name, given in origin.items() if name in expected and given is not None}
    missing = sorted(expected.keys() - origin.keys())
    extra = sorted(tensors.keys() - set(origin.values()))
    misshapen = [
        f"{name} {tuple(tensors[given].shape)} for {expected[name]}"
        for name, given in sorted(origin.items())
        if tuple(tensors[given].shape) != expected[name]
    ]
    if found := _listed({"missing": missing, "extra": extra, "of another shape": misshapen}):
        raise ConversionError(
            f"the file does not fit the pipeline's UNet, whose {len(expected)} tensors were expected; pass the "
            "pipeline that it was made from:\n  " + "\n  ".join(found)
        )
    return {name: tensors[given] for name, given in origin.items()}


def _named_as_ours(tensors: dict[str, Tensor], unet: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that have the names of a UNet's parameters, and the names that the file gives them.

    Raises:
        ConversionError: one has another shape.
    """
    known = unet.state_dict()
    found = {name: name.removeprefix("unet.") for name in tensors if name.removeprefix("unet.") in known}
    for given, name in found.items():
        if tensors[given].shape != known[name].shape:
            expected, got = tuple(known[name].shape), tuple(tensors[given].shape)
            raise ConversionError(f"the file's {given} has the shape {got}, the pipeline's UNet {expected} there")
    return {name: tensors[given] for given, name in found.items()}, list(found)


def _moving_average(tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The EMA weights by the names of the weights; CompVis stores them under names without dots."""
    stored = {EMA + name.removeprefix("model.").replace(".", ""): name for name in weights}
    present = {name for name in tensors if name.startswith(EMA) and name not in EMA_COUNTERS}
    if not present:
        raise ConversionError(
            "the file has no EMA weights beside the weights; omit --ema (files named emaonly have them in their place)"
        )
    if found := _listed({"missing": sorted(stored.keys() - present), "extra": sorted(present - stored.keys())}):
        raise ConversionError(
            f"the file's EMA weights are not those of its UNet ({'; '.join(found)}); omit --ema, or pass a checkpoint "
            "that was saved with them"
        )
    return {name: tensors[given] for given, name in stored.items()}


def _check_class(model: str) -> None:
    """Raise ConversionError unless the pipeline is of the authors' kind; loads no weights."""
    name = read_model_index(model)["_class_name"]
    if name != "StableDiffusionPipeline":
        raise ConversionError(
            f"expected --model to be a StableDiffusionPipeline, as the authors'; {model} is a {name}"
        )


def _load(model: str) -> Family:
    return get_family(load_pipeline(model, revision=None, variant=None, dtype="float32"))


def _read_tensors(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file's state dict, by name, and the globals it names."""
    content, dropped = read_restricted(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    if isinstance(content, list) or any(name.startswith("module.") for name in names):
        raise ConversionError(
            f"{path} looks like a class-conditional checkpoint of the authors', whose network diffusers does not "
            "have; expected their Stable Diffusion's. sa-diffusers train-base trains a class-conditional model"
        )
    for name in names:
        if isinstance(state[name], RefusedTensor):
            raise ConversionError(f"{path}: the tensor {name!r} depends on {state[name].origin!r}, never imported")
    tensors = {name: state[name].detach() for name in names if isinstance(state[name], Tensor)}
    if not tensors:
        what = "a placeholder" if isinstance(state, Placeholder) else f"a {type(state).__name__} of {_first(names)}"
        raise ConversionError(f"{path} holds no tensors by name: expected a dict of them, got {what}")
    return tensors, dropped


def _check_values(tensors: dict[str, Tensor], what: str, lowest: float) -> None:
    """Raise ConversionError where a value is not finite or below `lowest`."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()) or bool((tensor < lowest).any()):
            range_ = "finite numbers" if lowest == -torch.inf else f"finite numbers of at least {lowest:g}"
            raise ConversionError(f"the {what}'s tensor {name} does not hold {range_} alone; the file is damaged")


def _listed(found: dict[str, list[str]]) -> list[str]:
    """What was found of each kind, where there is any."""
    return [f"{len(names)} {what}: {_first(names)}" for what, names in found.items() if names]


def _first(names: list[str]) -> str:
    """The first ten, and that there are more; escaped, since names of a file may hold a terminal's commands."""
    shown = ", ".join(names[:10]).encode("unicode_escape").decode()
    return (shown + (", ..." if len(names) > 10 else "")) or "nothing"
