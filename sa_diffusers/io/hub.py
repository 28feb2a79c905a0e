"""The way to and from the Hugging Face hub: errors that say what to do, download, push."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sa_diffusers import __version__
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.model_names import is_on_hub, is_repo_id, public_name


# What makes a tokenizer: without any of these files transformers builds an empty one and says nothing.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message says what to do."""


class PushError(RuntimeError):
    """A folder cannot be pushed to the hub; the message says what to do."""


def _check_folder(folder: Path) -> None:
    """Raise ModelLoadError for a pipeline folder that lacks a component of its index; other folders pass."""
    index, missing = folder / "model_index.json", []
    parts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    for name, entry in parts.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[1] is None:
            continue  # an option, or a component that this pipeline does without
        wanted = VOCABULARY_FILES if "Tokenizer" in entry[1] else ("*",)
        if not any(any((folder / name).glob(pattern)) for pattern in wanted):
            missing.append(name)
    if missing:
        raise ModelLoadError(
            f"The pipeline in {folder} has no {', '.join(missing)}, which its model_index.json lists. "
            "Copy the missing folders beside it, or save the pipeline again with save_pretrained."
        )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it came from: libraries wrap the one that tells what happened."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _advice(model: str, error: Exception, repo_type: str, revision: str | None) -> str:
    """What happened and what to do about it, in up to three sentences, of a library's own the first."""
    causes, said = list(_chain(error)), re.split(r"(?<=[.!?]) ", " ".join(str(error).split()))[0]
    what, flag = ("data set", " --repo-type dataset") if repo_type == "dataset" else ("model", "")
    flag += f" --revision {revision}" if revision else ""

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(GatedRepoError):
        return (
            f"'{model}' is gated: accept its licence on the {what}'s page on the hub, "
            "then run `hf auth login` and start again."
        )
    if is_any(RevisionNotFoundError):
        return f"'{model}' has no such revision: check --revision against the branches and tags on the hub."
    if Path(model).is_dir():
        lacks = repo_type == "model" and not (Path(model) / "model_index.json").is_file()
        index = " It has no model_index.json." if lacks else ""
        return f"The folder {model} cannot be loaded.{index} {said}"
    if is_any(RepositoryNotFoundError) or not is_repo_id(model):
        return (
            f"'{model}' is neither a local folder nor a {what} on the hub: check the name. "
            f"If it is a private {what}, run `hf auth login` first."
        )
    if is_any(EntryNotFoundError) and not is_any(LocalEntryNotFoundError):
        return f"'{model}' lacks a file that is needed: {said}"
    if is_any(ConnectionError, TimeoutError, LocalEntryNotFoundError, HTTPError):
        return (
            f"'{model}' is not on this machine and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set). "
            f"Pass a local folder, or run `hf download {model}{flag}` where there is a network. "
            "If you meant a folder, check its path."
        )
    return f"'{model}' cannot be loaded: {said}"


@contextmanager
def explain_load_errors(model: str | Path, repo_type: str = "model", revision: str | None = None) -> Iterator[None]:
    """Turn the errors of loading `model` in the block into ModelLoadError with advice, the original one chained.

    A pipeline folder is checked before the block runs, since transformers loads a missing tokenizer as an empty one.
    Errors of other kinds than those of files, names and networks (a bug, no memory) pass unchanged.

    Args:
        model: hub id of a "model" or "dataset", or local folder.
    """
    try:
        _check_folder(Path(model))
        yield
    except (OSError, ValueError, EntryNotFoundError, HTTPError) as error:
        raise ModelLoadError(_advice(str(model), error, repo_type, revision)) from error


def fetch(repo_id: str, files: Sequence[str], revision: str | None = None, repo_type: str = "model") -> Path:
    """Local folder with these files of a repository, downloaded unless the cache has them. Raises ModelLoadError."""
    with explain_load_errors(repo_id, repo_type, revision):
        paths = [hf_hub_download(repo_id, name, revision=revision, repo_type=repo_type) for name in files]
    return Path(paths[0]).parent


def fetch_folder(source: str, patterns: Sequence[str]) -> Path:
    """A local folder as it is; of a hub id the downloaded files of these patterns. Raises ModelLoadError."""
    if not is_on_hub(source):
        return Path(source).expanduser()
    with explain_load_errors(source):
        return Path(snapshot_download(source, allow_patterns=list(patterns)))


def read_part(model: str, part: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a pipeline's part, without its weights. Raises ModelLoadError: it cannot be read."""
    source = resolve(model)
    path = Path(source, part, "scheduler_config.json" if part == "scheduler" else "config.json")
    if is_on_hub(source):
        path = fetch(source, [f"{part}/{path.name}"], revision) / path.name
    with explain_load_errors(source):
        return json.loads(path.read_text(encoding="utf-8"))


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit that the cached files of a hub model are of; `revision` where there are none (a local folder)."""
    if not is_on_hub(model):
        return revision
    found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


def read_license(model: str, revision: str | None = None) -> str | None:
    """Licence id from the card of a model (hub id, folder, or bundled/<name>); None where it cannot be read."""
    if model.startswith("bundled/"):
        return "apache-2.0"
    try:
        folder = fetch(model, ["README.md"], revision) if is_on_hub(model) else Path(model)
        return ModelCard.load(folder / "README.md").data.license
    except (ModelLoadError, OSError, ValueError, yaml.YAMLError):
        return None


@contextmanager
def _explain_login_errors() -> Iterator[None]:
    """Name the command that logs in when there is no token, or one that the hub does not accept."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PushError("Not logged in to the hub: run `hf auth login` (or set HF_TOKEN) and start again.") from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise PushError("The hub does not accept your token: run `hf auth login` and start again.") from error
        raise


def check_push(repo_id: str, api: HfApi | None = None) -> None:
    """Raise PushError unless a push can succeed: the id is well-formed and someone is logged in."""
    if not is_repo_id(repo_id):
        raise PushError(
            f"'{repo_id}' is not a name for a model on the hub: expected user/name, or a name; pass --hub_model_id."
        )
    try:
        with _explain_login_errors():
            (api or HfApi()).whoami()
    except (OSError, HTTPError) as error:
        raise PushError(
            f"The hub cannot be reached: {error}. Omit --push_to_hub, and push later by sa-diffusers push."
        ) from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool,
    repo_type: str = "model",
    again: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload a folder in one commit, so that a failure half way leaves the hub as it was, and return the page's URL.

    Weights of a part that lie there already, and are none of these (of another variant, more shards), are removed.

    Args:
        again: what is whole and how to push it again, for the message when that fails; None: the folder, as it is.

    Raises:
        PushError: not logged in, or the upload failed.
    """
    api = api or HfApi()
    private_too = " --private" if private else ""
    command = f"Push it again with `hf upload {repo_id} {folder}{private_too}` or by running the same command."
    again = again or f"{folder} is whole. {command}"
    parts = sorted({file.parent.name for file in Path(folder).glob("*/*.safetensors")})
    stale = [f"{part}/*{kind}" for part in parts for kind in (".safetensors", ".bin", ".index*.json")]
    try:
        with _explain_login_errors():
            url = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,  # with the user's name, where that was left out
                folder_path=folder,
                commit_message="Upload with sa_diffusers",
                repo_type=repo_type,
                delete_patterns=stale,
            )
    except PushError:
        raise
    except (OSError, HTTPError, RuntimeError) as error:  # the last: huggingface_hub's for the upload of one file
        cause = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise PushError(
            f"The push to {repo_id} failed: {cause}. Nothing is lost, and nothing half made is on the hub: {again}"
        ) from error
    return str(url)


def provenance(model: str, revision: str | None) -> dict[str, str | None]:
    """What a Fisher or sample set says of its origin beside what decides it: model, revision (a commit), version."""
    return {"model": public_name(model), "revision": commit_of(model, revision), "version": __version__}
