"""What a model, or a folder, is called: whether a name is the hub's, and what to call one where others read it."""

import hashlib
import unicodedata
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sa_diffusers.core.concepts import fold


def is_repo_id(name: str) -> bool:
    """Whether the hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_on_hub(model: str) -> bool:
    """Whether a model's name is that of a repository: user/name, and no local path."""
    return "/" in model and is_repo_id(model) and not Path(model).exists()


def base_name(model: str) -> str:
    """A short name for a model: the last part of its id or path without a suffix, or the one before a "pipeline"."""
    path = Path(model.removesuffix(".safetensors").removesuffix(".ckpt"))
    return path.parent.name if path.name == "pipeline" and path.parent.name else path.name


def public_name(model: str) -> str:
    """What to call a model where others read it: its hub or bundled name; of a local path the short name alone."""
    return model if is_on_hub(model) or model.startswith("bundled/") else base_name(model)


def folder_name(text: str) -> str:
    """A name for a folder from the words of a text: "Brad Pitt" -> "brad-pitt", another for every text.

    What names nothing by its words alone (C++ beside C#, an emoji), or is too long for a file system, has a hash.
    """
    folded = fold(text)
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded)
    name = "-".join(kept.split())
    if name and len(name.encode()) <= 100 and not set(folded) - set(kept) - set(" .,:;!?'\"()&/"):
        return name
    short = name.encode()[:80].decode(errors="ignore")
    return "-".join(filter(None, (short, hashlib.sha256(folded.encode()).hexdigest()[:8])))
