"""The cards that the hub shows for a pipeline, a LoRA, a Fisher and a sample set; their texts are the templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sa_diffusers.families import family_class, own_pipeline_classes
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.model_names import base_name, is_on_hub, public_name
from sa_diffusers.report.metrics_table import metric_rows
from sa_diffusers.report.page import render, write_page
from sa_diffusers.report.tables import flatten


TEXT_TO_IMAGE, COMPLETES = "text-to-image", "image-to-image"  # the hub's names for the tasks


def write_model_card(
    folder: str | Path,
    *,
    base_model: str,
    metrics: Mapping[str, Any] | None,
    license: str | None,
    pipeline_class: str | None = None,
    lora: bool = False,
    **said: Any,
) -> Path:
    """Write the folder's README.md, the card that the hub shows; returns its path.

    Args:
        base_model: hub id or path of the pipeline that knew the concept; only an id is linked.
        metrics: as of `metric_rows`, or None where nothing was measured.
        license: the base model's licence id on the hub, which holds for this one too; None where unknown.
        pipeline_class: the class that loads it: one of this package, or (or None) a stock one of diffusers.
        lora: the folder holds pytorch_lora_weights.safetensors, or an adapter a concept, in place of a pipeline.
        said: concept; surrogate (None: none that was chosen); method in words; settings by name, with their units;
            images, paths in the folder; dtype, precision to load it in, since without one transformers and diffusers
            choose differently; variant, "fp16" where the folder also holds float16 files of this name
            (`loading.save_pipeline`), or None; requests, of a chain, see `request_table`, or None.
    """
    stock, family = pipeline_class not in own_pipeline_classes(), family_class(pipeline_class or "")
    data = _model_data(base_model, pipeline_class, license, lora)
    base, path = public_name(base_model), Path(folder) / "README.md"
    write_page(
        path,
        "model_card.md.j2",
        data=data.to_yaml(),
        title=base_name(base),
        base=base,
        bundled=base.startswith("bundled/"),
        library="diffusers" if stock else "sa_diffusers",
        loader="DiffusionPipeline" if stock else pipeline_class,
        completes=data.pipeline_tag == COMPLETES,
        unguided=family.pipelines[0] if data.pipeline_tag == TEXT_TO_IMAGE and not stock else None,
        lora=lora,
        adapters=sorted(p.stem for p in path.parent.glob("*.safetensors") if p.stem != "pytorch_lora_weights"),
        rows=[(row.label, row.before, row.after) for row in metric_rows(metrics)] if metrics else [],
        license=license,
        **said,
    )
    return path


def _model_data(base_model: str, pipeline_class: str | None, license: str | None, lora: bool) -> ModelCardData:
    """What the hub finds a model by; the tag of a text-to-image family is its name, as diffusers has it."""
    on_hub, family, tags = is_on_hub(base_model), family_class(pipeline_class or ""), ["diffusers"]
    completes = family is not None and "completion" in family.capabilities
    reads_text = family is None or "text" in family.capabilities
    if reads_text:
        tags += [family.name.replace("_", "-")] if family else []
        tags += [TEXT_TO_IMAGE]
    return ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if lora and on_hub else None,
        library_name="diffusers",
        pipeline_tag=TEXT_TO_IMAGE if reads_text else COMPLETES if completes else "unconditional-image-generation",
        tags=[*tags, *(["lora"] if lora else []), "sa_diffusers", "concept-forgetting"],
        license=license,
    )


def fisher_card(metadata: Mapping[str, Any], repo_id: str, license: str | None) -> str:
    """The card of a Fisher's repository, from its metadata (`Fisher.metadata`) and the licence of its model."""
    model = metadata.get("model") or "the model"
    data = ModelCardData(
        base_model=model if is_on_hub(model) else None,
        library_name="sa_diffusers",
        tags=["sa_diffusers", "fisher-information", "concept-forgetting"],
        license=license,
    )
    known = {"reduction": None, "num_terms": None} | dict(metadata)
    fields = {"id": fingerprint(metadata)} | flatten(metadata)
    values = {"base": model, "repo_id": repo_id, "license": license, "metadata": known, "fields": fields}
    return render("fisher_card.md.j2", data=data.to_yaml(), **values)


def samples_card(key: Mapping[str, Any], repo_id: str, license: str | None, picture: str | None = None) -> str:
    """The card of a sample set's repository.

    Args:
        key: samples.json: the model's hashes, what decided the samples, and under `provenance` the model's name.
        picture: name of the file of pictures to show.
    """
    origin = key.get("provenance", {})
    settings = origin | {name: value for name, value in key.items() if name not in ("model", "provenance")}
    data = ModelCardData(tags=["sa_diffusers", "synthetic", "concept-forgetting"], license=license, viewer=False)
    return render(
        "samples_card.md.j2",
        data=data.to_yaml(),
        base=origin.get("model") or "the model",
        repo_id=repo_id,
        license=license,
        picture=picture,
        settings=flatten(settings),
        parts=key.get("model", {}),
    )


def speed_card(notes: Mapping[str, Any], repo_id: str, license: str | None) -> str:
    """The card of a repository of SPEED's embeddings, from the notes of the file (`text_encoders`, `prompts`)."""
    data = ModelCardData(
        library_name="sa_diffusers", tags=["sa_diffusers", "text-embeddings", "concept-forgetting"], license=license
    )
    origin = notes.get("provenance", {})
    values = {"base": origin.get("model") or "the model", "repo_id": repo_id, "license": license, "origin": origin}
    return render("speed_card.md.j2", data=data.to_yaml(), notes=notes, **values)
