"""What can be told of pipelines before one of them is loaded: that their files are there, how large they draw."""

import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn

from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.subjects import Subject
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import ModelLoadError, explain_load_errors
from sa_diffusers.io.loading import read_model_index
from sa_diffusers.pipelines import OWN_PIPELINES


WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def check_subjects(config: PipelineEvaluationConfig, subjects: Sequence[Subject], image_size: int | None) -> None:
    """Check every pipeline's files, downloading what is missing, and the size of its pictures where its files say it.

    Args:
        image_size: pixels a side that the classifier reads; None: there is none.

    Raises:
        ModelLoadError: files that are missing or damaged. ValueError: pictures of another size.
    """
    for subject in subjects:
        check_files(subject.source, config.variant)
    for subject in subjects:
        size = picture_size(subject.source)
        check_size(subject.source, size, image_size)
        if "change" in config.metric_names:
            image_size = image_size or size


def check_size(source: str, size: int | None, expected: int | None) -> None:
    """Raise ValueError where both sizes are known and differ."""
    if None not in (size, expected) and size != expected:
        raise ValueError(
            f"expected pictures of {expected} pixels a side, as the classifier reads or the first pipeline draws "
            f"them, got {size} from {source}; leave the metric (classifier, change) or the pipeline away"
        )


def picture_size(source: str) -> int | None:
    """Pixels a side that a pipeline of a UNet and a VAE draws, from their small files; None: it is of another kind."""
    index = read_model_index(source)
    kinds = [(index.get(name) or (None, None))[1] for name in ("unet", "vae")]
    if kinds != ["UNet2DConditionModel", "AutoencoderKL"]:
        return None
    with explain_load_errors(resolve(source)):
        size = UNet2DConditionModel.load_config(resolve(source), subfolder="unet").get("sample_size")
        blocks = AutoencoderKL.load_config(resolve(source), subfolder="vae").get("block_out_channels")
    return size * 2 ** (len(blocks) - 1) if isinstance(size, int) and blocks else None


def check_files(source: str, variant: str | None) -> None:
    """Download what a hub model lacks here; check that every part has weights, and that no file of them is cut off.

    Raises:
        ModelLoadError: with what to do about it.
    """
    index = read_model_index(source)
    folder = Path(resolve(source))
    if not folder.is_dir():
        cls = OWN_PIPELINES.get(index["_class_name"], DiffusionPipeline)
        with explain_load_errors(source):
            folder = Path(cls.download(source, variant=variant))
    for name, entry in index.items():
        if isinstance(entry, list | tuple) and len(entry) == 2 and _is_module(*entry):
            _check_weights(folder / name, source)


def _is_module(library: str | None, kind: str | None) -> bool:
    """Whether a part of a pipeline has weights, by the library and the class that model_index.json names."""
    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    cls = getattr(home, kind, None) if home and kind else None
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _check_weights(folder: Path, source: str) -> None:
    again = f"{source} cannot be loaded. Copy or download it again, or save it again with save_pretrained"
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ModelLoadError(f"{folder} holds no weights ({', '.join(WEIGHTS)}): {again}")
    for listed in folder.glob("*.index*.json"):
        shards = set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(name for name in shards if not (folder / name).exists()):
            raise ModelLoadError(f"{folder} lacks {', '.join(missing)}, which {listed.name} lists: {again}")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header, and compares it with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file} is damaged ({error}): {again}") from error
