"""The pages that the hub shows for a pipeline, a LoRA, a Fisher and a sample set, and names fit for them."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.pipelines import OWN_PIPELINES


GUIDES = "SafeGuidancePipeline"  # of the pipeline classes here the one whose weights have not changed
LIMITS = (
    "The concept is suppressed, not proven erased: other words for it, further training or an attack "
    "on the weights may bring it back, and what is close to it may have changed as well."
)


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
    """A short name for a model: the last part of its id or path, or the one before a last part "pipeline"."""
    path = Path(model)
    return path.parent.name if path.name == "pipeline" and path.parent.name else path.name


def public_name(model: str) -> str:
    """What to call a model where others read it: its hub or bundled name; of a local path the short name alone."""
    return model if is_on_hub(model) or model.startswith("bundled/") else base_name(model)


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


def _before_after(metrics: Mapping[str, Any]) -> str:
    """The table of metrics.json: what was measured before or after."""
    before, after = _flatten(metrics["before"]), _flatten(metrics["after"])
    known = [key for key in before | after if (before.get(key), after.get(key)) != (None, None)]
    return _table(("measure", "before", "after"), ((f"`{key}`", before.get(key), after.get(key)) for key in known))


def _licence(base: str, license: str | None) -> str:
    return f"## Licence\n\nThat of the base model, `{base}`" + (f": {license}." if license else "; look it up there.")


def _page(data: ModelCardData, sections: Iterable[str]) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _how_to_load(base: str, loader: str, library: str, dtype: str, variant: str | None, lora: bool) -> str:
    """The section on use: code that runs as it stands once the paths are filled in."""
    here = '"path/or/hub-id/of/this/model"'
    lines = ["import torch", f"from {library} import {loader}", ""]
    if lora:
        text = f"A LoRA in diffusers' own layout; nothing but {library} is needed."
        source = f'"{base}"'
        if base.startswith("bundled/"):
            text = "A LoRA in diffusers' own layout, for a pipeline that ships with sa_diffusers."
            lines.insert(2, "from sa_diffusers.io.bundled import resolve")
            source = f"resolve({source})"
        lines += [
            f"pipeline = {loader}.from_pretrained({source}, dtype=torch.{dtype})",
            f'pipeline.load_lora_weights({here}, adapter_name="forget")',
            'pipeline.set_adapters("forget", 1.0)  # 0: the base model; what lies between was not measured',
            "",
            "# the base model again:",
            "pipeline.unload_lora_weights()",
            "",
            "# or a plain pipeline that needs no LoRA:",
            f"pipeline.load_lora_weights({here})",
            "pipeline.fuse_lora()",
            "pipeline.unload_lora_weights()",
            'pipeline.save_pretrained("forgotten")',
        ]
    else:
        text = f"A pipeline of the base model's own class; nothing but {library} is needed."
        if loader == GUIDES:
            text = (
                "The weights are the base model's: the class leads away from the concept while it draws. "
                "`StableDiffusionPipeline` loads this folder, too, and draws without that."
            )
        lines.append(f"pipeline = {loader}.from_pretrained({here}, dtype=torch.{dtype})")
        if variant:
            lines.append(f'# smaller files: {loader}.from_pretrained(..., variant="{variant}", dtype=torch.float16)')
    return f"## Use\n\n{text}\n\n```python\n" + "\n".join(lines) + "\n```"


def write_model_card(
    folder: str | Path,
    *,
    base_model: str,
    concept: str,
    surrogate: str | None,
    method: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    images: Sequence[str],
    license: str | None,
    dtype: str = "float32",
    pipeline_class: str = "StableDiffusionPipeline",
    variant: str | None = None,
    lora: bool = False,
) -> Path:
    """Write the folder's README.md, the card that the hub shows.

    Args:
        base_model: hub id or path of the pipeline that knew the concept; only an id is linked.
        concept, surrogate: what was forgotten, and what is drawn in its place; None: nothing that was chosen.
        method: the method's name in words.
        settings: name, with its unit where it has one, to value: lambda, Fisher id, seed, steps, ...
        metrics: {"before": {...}, "after": {...}} as in metrics.json, or None where nothing was measured.
        images: paths relative to the folder of the pictures to show, before and after.
        dtype: precision to load it in; without one transformers and diffusers choose differently.
        pipeline_class: the class that loads it: a stock one of diffusers, or one of this package.
        variant: "fp16" where the folder holds float16 files of this name, too (`loading.save_pipeline`).
        lora: the folder holds pytorch_lora_weights.safetensors in place of a pipeline.
        license: the base model's licence id on the hub, which holds for this one too; None where unknown.

    Returns:
        Path of the card.
    """
    stock = pipeline_class not in OWN_PIPELINES
    library, loader = ("diffusers", "DiffusionPipeline") if stock else ("sa_diffusers", pipeline_class)
    base, what = public_name(base_model), "A LoRA for" if lora else ""
    purpose = f"led by {method} away from"
    if surrogate is not None:
        purpose = f"changed by {method} to draw **{escape(surrogate)}** where it is asked for"
    sections = [
        f"# {base_name(base)} without “{escape(concept)}”" + (" (LoRA)" if lora else ""),
        f"{what} `{base}` {purpose} **{escape(concept)}**.".lstrip(),
        *(f"![Before and after]({image})" for image in images),
        _how_to_load(base, loader, library, dtype, variant, lora),
        "## How it was made\n\n" + _table(("setting", "value"), settings.items()),
    ]
    if metrics:
        sections.append(f"## Before and after\n\n{_before_after(metrics)}")
    sections += [f"## Limits\n\n{LIMITS}", _licence(base, license)]
    reads_text = stock or pipeline_class == GUIDES
    text_to_image = ["stable-diffusion", "text-to-image"] if reads_text else []
    adapter = ["lora"] if lora else []
    data = ModelCardData(
        base_model=base_model if is_on_hub(base_model) else None,
        base_model_relation="adapter" if lora and is_on_hub(base_model) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image" if reads_text else "unconditional-image-generation",
        tags=["diffusers", *text_to_image, *adapter, "sa_diffusers", "concept-forgetting"],
        license=license,
    )
    path = Path(folder) / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text(_page(data, sections), encoding="utf-8")
    return path


def fisher_card(metadata: Mapping[str, Any], repo_id: str, license: str | None) -> str:
    """The card of a Fisher's repository, from its metadata (`Fisher.metadata`) and the licence of its model."""
    model = metadata.get("model") or "the model"
    sections = [
        f"# Fisher of {model}",
        f"Which weights matter to what `{model}` draws: for each, the squared gradient of the loss, summed over "
        f"timesteps and then squared, averaged over the model's own samples. It is the diagonal Fisher by which "
        "[Selective Amnesia](https://arxiv.org/abs/2305.10120) holds a model's weights while it forgets a concept. "
        "No concept went into it, so it serves any.",
        f'## Use\n\n```bash\naccelerate launch scripts/forget.py --model {model} --concept "..." --surrogate "..." '
        f"--fisher {repo_id}\n```\n\n```python\nfrom sa_diffusers import Fisher\n\n"
        f'fisher = Fisher.from_pretrained("{repo_id}")  # .tensors: float32, by parameter name; .metadata\n```\n\n'
        "A model with other weights, or another loss, is refused.",
        "## How it was made\n\n"
        + _table(("field", "value"), ({"id": fingerprint(metadata)} | _flatten(metadata)).items()),
        f"## Limits\n\nThe unit is that of the loss: a {metadata.get('reduction')} over a sample's values, summed "
        f"over {metadata.get('num_terms')} timesteps. A lambda of another unit does not carry over. "
        "`total_relative_error` is that of the sum over all weights; single weights are noisier.",
        _licence(model, license),
    ]
    data = ModelCardData(
        base_model=model if is_on_hub(model) else None,
        library_name="sa_diffusers",
        tags=["sa_diffusers", "fisher-information", "concept-forgetting"],
        license=license,
    )
    return _page(data, sections)


def samples_card(key: Mapping[str, Any], repo_id: str, license: str | None, picture: str | None = None) -> str:
    """The card of a sample set's repository.

    Args:
        key: samples.json: the model's hashes, what decided the samples, and under `provenance` the model's name.
        picture: name of the file of pictures to show.
    """
    origin = key.get("provenance", {})
    model = origin.get("model") or "the model"
    settings = origin | {name: value for name, value in key.items() if name not in ("model", "provenance")}
    sections = [
        f"# Samples of {model}",
        f"Pictures that `{model}` drew, as latents, each with its prompt. Selective Amnesia replays those that do not "
        "show what is to be forgotten, and estimates its Fisher on all. They know nothing of the concept, and serve "
        "any.",
        *([f"![The first of them]({picture})"] if picture else []),
        f'## Use\n\n```bash\naccelerate launch scripts/forget.py --model {model} --concept "..." --surrogate "..." '
        f"--samples {repo_id}\n```\n\n```python\nfrom sa_diffusers.data.sample_set import SampleSet\n\n"
        f'samples = SampleSet.from_pretrained("{repo_id}")  # .latents: float32, .prompts\n```\n\n'
        "A model with other weights is refused.",
        "## How they were made\n\n" + _table(("field", "value"), _flatten(settings).items()),
        "## Weights that drew them\n\n" + _table(("part", "hash"), key.get("model", {}).items()),
        "## Limits\n\nThey show what the model draws, right or wrong, the unwanted included; nobody looked through "
        "them.",
        _licence(model, license),
    ]
    tags = ["sa_diffusers", "synthetic", "concept-forgetting"]
    return _page(ModelCardData(tags=tags, license=license, viewer=False), sections)
