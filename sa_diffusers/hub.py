"""The way to and from the Hugging Face hub: errors that say what to do, model cards, push."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from sa_diffusers.pipelines import OWN_PIPELINES


# What makes a tokenizer: without any of these files transformers builds an empty one and says nothing.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


class ModelLoadError(RuntimeError):
    """A model could not be loaded; the message says what to do."""


class PushError(RuntimeError):
    """A folder cannot be pushed to the hub; the message says what to do."""


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _missing_components(folder: Path) -> list[str]:
    """Names of the components that model_index.json lists and the folder lacks."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    missing = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[1] is None:
            continue  # an option, or a component that this pipeline does without
        wanted = VOCABULARY_FILES if "Tokenizer" in entry[1] else ("*",)
        if not any(any((folder / name).glob(pattern)) for pattern in wanted):
            missing.append(name)
    return missing


def _check_folder(folder: Path) -> None:
    """Raise ModelLoadError for a pipeline folder that lacks a component; other folders pass."""
    if (folder / "model_index.json").is_file() and (missing := _missing_components(folder)):
        raise ModelLoadError(
            f"The pipeline in {folder} has no {', '.join(missing)}, which its model_index.json lists. "
            "Copy the missing folders beside it, or save the pipeline again with save_pretrained."
        )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it came from: libraries wrap the one that tells what happened."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _advice(model: str, error: Exception) -> str:
    """What happened and what to do about it, in one or two sentences."""
    causes = list(_chain(error))

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(GatedRepoError):
        return (
            f"'{model}' is gated: accept its licence on the model's page on the hub, "
            "then run `hf auth login` and start again."
        )
    if is_any(RevisionNotFoundError):
        return f"'{model}' has no such revision: check --revision against the branches and tags on the hub."
    if Path(model).is_dir():
        index = "" if (Path(model) / "model_index.json").is_file() else " It has no model_index.json."
        return f"The folder {model} cannot be loaded.{index} {error}"
    if is_any(RepositoryNotFoundError) or not _is_repo_id(model):
        return (
            f"'{model}' is neither a local folder nor a model on the hub: check the name. "
            "If it is a private model, run `hf auth login` first."
        )
    if is_any(EntryNotFoundError) and not is_any(LocalEntryNotFoundError):
        return f"'{model}' lacks a file that a pipeline needs: {error}"
    if is_any(ConnectionError, TimeoutError, LocalEntryNotFoundError, HTTPError):
        return (
            f"'{model}' is not on this machine and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set). "
            f"Pass a local folder, or run `hf download {model}` where there is a network. "
            "If you meant a folder, check its path."
        )
    return f"'{model}' cannot be loaded: {error}"


@contextmanager
def explain_load_errors(model: str | Path) -> Iterator[None]:
    """Turn the errors of loading `model` in the block into ModelLoadError with advice, the original one chained.

    A pipeline folder is checked before the block runs, since transformers loads a missing tokenizer as an empty one.
    Errors of other kinds than those of files, names and networks (a bug, no memory) pass unchanged.

    Args:
        model: hub id or local folder, as given to `from_pretrained`.

    Raises:
        ModelLoadError: gated, not found, no network, or a folder that lacks something.
    """
    try:
        _check_folder(Path(model))
        yield
    except (OSError, ValueError, EntryNotFoundError, HTTPError) as error:
        raise ModelLoadError(_advice(str(model), error)) from error


def _cell(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value).replace("|", "\\|")


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"attribute_accuracy": {"ink": 1.0}} -> {"attribute_accuracy.ink": 1.0}."""
    flat = {}
    for key, value in values.items():
        flat |= {f"{key}.{part}": v for part, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def base_name(model: str) -> str:
    """A short name for a model: the last part of its id or path, or the one before a last part "pipeline"."""
    path = Path(model)
    return path.parent.name if path.name == "pipeline" and path.parent.name else path.name


def write_model_card(
    folder: str | Path,
    *,
    base_model: str,
    concept: str,
    surrogate: str,
    method: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    images: Sequence[str],
    license: str | None,
    dtype: str = "float32",
    pipeline_class: str = "StableDiffusionPipeline",
) -> Path:
    """Write the folder's README.md, the card that the hub shows.

    Args:
        base_model: hub id or path of the pipeline that knew the concept; only an id is linked.
        concept, surrogate: what was forgotten, and what is drawn in its place.
        method: the method's name in words.
        settings: name, with its unit where it has one, to value: lambda, Fisher id, seed, steps, ...
        metrics: {"before": {...}, "after": {...}} as in metrics.json, or None where nothing was measured.
        images: paths relative to the folder of the pictures to show, before and after.
        dtype: precision to load it in; without one transformers and diffusers choose differently.
        pipeline_class: the class that loads it: a stock one of diffusers, or one of this package.
        license: the base model's licence id on the hub, which holds for this one too; None where unknown.

    Returns:
        Path of the card.
    """
    stock = pipeline_class not in OWN_PIPELINES
    library, loader = ("diffusers", "DiffusionPipeline") if stock else ("sa_diffusers", pipeline_class)
    on_hub = _is_repo_id(base_model) and not Path(base_model).exists()
    base = base_model if on_hub else base_name(base_model)
    sections = [
        f"# {base_name(base)} without “{escape(concept)}”",
        f"`{base}` trained by {method} to draw **{escape(surrogate)}** where it is asked for **{escape(concept)}**.",
        *(f"![Before and after]({image})" for image in images),
        f"## Use\n\nA pipeline of the base model's own class; nothing but {library} is needed.",
        f"```python\nimport torch\nfrom {library} import {loader}\n\n"
        f'pipeline = {loader}.from_pretrained("path/or/hub-id/of/this/model", dtype=torch.{dtype})\n```',
        "## How it was made\n\n" + _table(("setting", "value"), settings.items()),
    ]
    if metrics:
        before, after = _flatten(metrics["before"]), _flatten(metrics["after"])
        known = [key for key in before | after if (before.get(key), after.get(key)) != (None, None)]
        rows = ((f"`{key}`", before.get(key), after.get(key)) for key in known)
        sections.append("## Before and after\n\n" + _table(("measure", "before", "after"), rows))
    sections += [
        "## Limits\n\nThe concept is suppressed, not proven erased: other words for it, further training or an attack "
        "on the weights may bring it back, and what is close to it may have changed as well.",
        f"## Licence\n\nThat of the base model, `{base}`" + (f": {license}." if license else "; look it up there."),
    ]
    text_to_image = ["stable-diffusion", "text-to-image"] if stock else []
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image" if stock else "unconditional-image-generation",
        tags=["diffusers", *text_to_image, "sa_diffusers", "concept-forgetting"],
        license=license,
    )
    path = Path(folder) / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(path)
    return path


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
    """Check before work starts that a push can succeed: the id is well-formed and someone is logged in.

    Raises:
        PushError: what is wrong and what to do.
    """
    if not _is_repo_id(repo_id):
        raise PushError(f"'{repo_id}' is not a name for a model on the hub: expected user/name.")
    try:
        with _explain_login_errors():
            (api or HfApi()).whoami()
    except (OSError, HTTPError) as error:
        raise PushError(f"The hub cannot be reached: {error}. Leave out --push_to_hub and push later.") from error


def push_folder(folder: str | Path, repo_id: str, *, private: bool, api: HfApi | None = None) -> str:
    """Upload a folder in one commit, so that a failure half way leaves the hub as it was, and return the page's URL.

    Raises:
        PushError: not logged in, or the upload failed; the message says how to push the folder again.
    """
    api = api or HfApi()
    try:
        with _explain_login_errors():
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with sa_diffusers")
    except (OSError, HTTPError) as error:
        raise PushError(
            f"The push to {repo_id} failed: {error}. Nothing is lost: {folder} is whole. "
            f"Push it again with `hf upload {repo_id} {folder}` or by running the same command."
        ) from error
    return str(url)
