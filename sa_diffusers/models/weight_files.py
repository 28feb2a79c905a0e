"""The weight files of a pipeline's part: their variants, and whether they are whole."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.io.restricted_pickle import pointer


WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# A variant's name stands before the number of a file of several, or behind it.
VARIANT = re.compile(r"\w+(?:-\d+-of-\d+)?(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def _variant_of_list(file: Path) -> str | None:
    found = re.fullmatch(r"\w+(?:\.(\w+))?\.(?:safetensors|bin)\.index(?:\.(\w+))?\.json", file.name)
    return found and (found[1] or found[2])


def _shards(listed: Path) -> set[str]:
    return set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values())


def check_whole(part: nn.Module, folder: Path, variant: str | None) -> None:
    """Raise ModelLoadError for weights that are in none of a part's files: they would be whatever lay in memory.

    Files with names that are none of the part's own are older ones, whose names the libraries know how to read.
    """
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        name = VARIANT.fullmatch(file.name)
        if name and name[1] == variant:
            with safe_open(file, framework="pt") as opened:
                found.update(opened.keys())
    lost = sorted({name for name, _ in part.named_parameters()} - found)
    if found and found <= part.state_dict().keys() and lost:
        more = f" and {len(lost) - 1} more" if lost[1:] else ""
        raise ModelLoadError(
            f"The weights in {folder} lack {lost[0]}{more}; save the whole pipeline, or copy it again."
        )


def check_weights(folder: Path, source: str, variant: str | None) -> None:
    again = f"{source} cannot be loaded. Copy or download it again, or save it again with save_pretrained"
    files = [file.name for pattern in WEIGHTS for file in folder.glob(pattern)]
    if not files:
        raise ModelLoadError(f"{folder} holds no weights ({', '.join(WEIGHTS)}): {again}")
    variants = [found[1] for found in map(VARIANT.fullmatch, files) if found]
    if variant is None and variants and None not in variants:
        raise ModelLoadError(f"{folder} has weights of the variant {variants[0]} alone; pass --variant {variants[0]}")
    lists = {file: _variant_of_list(file) for file in folder.glob("*.index*.json")}
    asked = variant if variant in lists.values() else None  # what else is there need not be whole
    for listed in (file for file, name in lists.items() if name == asked):
        if missing := sorted(name for name in _shards(listed) if not (folder / name).exists()):
            raise ModelLoadError(f"{folder} lacks {', '.join(missing)}, which {listed.name} lists: {again}")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header, and compares it with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file} is damaged ({pointer(file) or error}): {again}") from error


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a part's weights are all there in a variant: in one file, or in all of a list, which is written last."""
    lists = [file for file in folder.glob("*.index*.json") if _variant_of_list(file) == variant]
    if lists:
        return all((folder / name).exists() for file in lists for name in _shards(file))
    return any("-of-" not in file.name for file in folder.glob(f"*.{variant}.safetensors"))
