"""The run at other strengths: what each is found to do, and the one that is chosen, saved as the result."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sa_diffusers.core.safetensors_header import sort_metadata
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.io.artifacts import Marker
from sa_diffusers.io.atomic_files import ArtifactError, atomic_path
from sa_diffusers.io.loading import save_pipeline
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Stage
from sa_diffusers.models.precision import kept_weights
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.evaluate import EvaluateStage
from sa_diffusers.runs.stages.tracking import snapshot_dir
from sa_diffusers.runs.stages.train import TRAINED, TrainStage, load_weights, records_of
from sa_diffusers.training.for_others import FOR_OTHERS, add_what_was_asked_since, save_for_others
from sa_diffusers.training.lora import LORA_FILE
from sa_diffusers.training.strengths import Strength


class StrengthStage(EvaluateStage):
    """The judgement of one strength; that of what training ended with is the run's own."""

    def __init__(self, strength: Strength):
        super().__init__(strength.name, ("model", "train", "exam", "pictures"))
        self.strength = strength

    def content(self, context: RunContext) -> dict:
        return super().content(context) | {"strength": str(self.strength)}

    def compute(self, context: RunContext) -> Findings:
        with kept_weights(context.family.module):
            _set(context, self.strength)
            return super().compute(context)


class ChoiceStage(Stage[None]):
    """The chosen strength as the result, in the place of what training left, which is kept in `TRAINED`."""

    name = counts_as = "choice"
    inputs = ("model", "train")
    leaves, shown = ("pipeline/**/*", "lora/*", *FOR_OTHERS), True

    def content(self, context: RunContext) -> dict:
        return {"strength": str(context.strength)}

    def compute(self, context: RunContext) -> None:
        options, family, folder, strength = context.options, context.family, context.folder, context.strength
        _set(context, strength)
        if not process_state().is_main_process:
            return
        _keep_trained(folder)
        said = {} if strength.trained else {"strength": str(strength)}
        records = [*context.forgotten, *(one | said for one in records_of(context))]
        saved = (options.dtype, options.save_variant, records)
        save_pipeline(family.pipeline, folder / "pipeline", family.module, *saved)
        for name in FOR_OTHERS:
            (folder / name).unlink(missing_ok=True)  # training's, which are kept
        shutil.rmtree(folder / "lora", ignore_errors=True)  # of what --overwrite replaces
        adapter = f"lora/{LORA_FILE}"
        if options.leaves_adapter and (trained := folder / TRAINED / adapter).exists():
            _save_scaled(trained, folder / adapter, strength.value)
        save_for_others(family, folder, options)

    def load(self, context: RunContext) -> None:
        load_weights(context.family.module, context.folder / "pipeline", context.family.component)
        if process_state().is_main_process:
            add_what_was_asked_since(context.family, context.folder, context.options)

    def describe(self, context: RunContext) -> str:
        return f"{context.strength} becomes the result"


@torch.no_grad()
def _set(context: RunContext, strength: Strength) -> None:
    """Bring the model from what training ended with to a strength. Raises ArtifactError: its snapshot is gone."""
    module = context.family.module
    if strength.kind == "scale":
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not strength.trained:
                value.copy_(context.original[name].to(value.device).lerp(value, strength.value))
    elif not strength.trained:
        snapshot = snapshot_dir(context.folder, int(strength.value))
        if not snapshot.exists():
            raise ArtifactError(f"{snapshot} is gone; choose another strength, or run it in another --output_dir")
        load_weights(module, snapshot, context.family.component)


def _keep_trained(folder: Path) -> None:
    """Copy what training left to `TRAINED`, where it is not there yet, and have its stage find it there."""
    if not (folder / TRAINED).exists():
        with atomic_path(folder / TRAINED) as new:
            for part in ("pipeline", "lora", *FOR_OTHERS):
                if (folder / part).exists():
                    (shutil.copyfile if part in FOR_OTHERS else shutil.copytree)(folder / part, new / part)
    moved = {part.name for part in (folder / TRAINED).iterdir()}
    marker = Marker(folder, TrainStage.name, {})
    marker.rename(lambda name: f"{TRAINED}/{name}" if name.split("/")[0] in moved else name)


def _save_scaled(source: Path, path: Path, scale: float) -> None:
    """Write an adapter whose change is `scale` times that of another, with the same rank and alpha."""
    with safe_open(source, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    ups = {name: tensor * scale for name, tensor in tensors.items() if ".lora_B." in name}
    with atomic_path(path) as temporary:
        save_file(tensors | ups, temporary, about)
        sort_metadata(temporary)
