"""Checkpoints of the optimisation loop: complete or absent, of what is trained, a limited number of them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sa_diffusers.io.atomic_files import DamagedFile, damages, explain_write_errors, file_hash, read_json
from sa_diffusers.io.processes import say


HASHES = "hashes.json"  # of a checkpoint's files
WHOLE = "with whole weights"
WRAPPED = "module."  # before the names of a model that several processes share


class Checkpoints:
    """Checkpoints of one optimisation: `step_<n>` folders, complete or absent, the newest `limit` kept.

    Args:
        accelerator: with the model and the optimiser that it has prepared.
        registered: what else changes with the steps, objects with a state dict.
    """

    def __init__(self, accelerator: Accelerator, folder: Path | None, limit: int, registered: Sequence[object]):
        self.accelerator, self.folder, self.limit = accelerator, folder, limit
        accelerator.register_for_checkpointing(*registered)
        if self._way() == WHOLE:
            accelerator.register_save_state_pre_hook(_keep_trained)
            accelerator.register_load_state_pre_hook(_load_trained)

    def existing(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        return sorted(self.folder.glob("step_*[0-9]")) if self.folder is not None else []

    def resume(self) -> tuple[int, list[dict]]:
        """Load the newest checkpoint that is whole; returns the step to start with and the history so far.

        Newer ones that are damaged are set aside as *.damaged, each with a line that says so.

        Raises:
            ValueError: it was written in another way (FSDP2, DeepSpeed and its processes, or neither).
        """
        if self.folder is not None and self.accelerator.is_main_process:
            for partial in self.folder.glob("step_*.partial"):  # of a process that was killed
                shutil.rmtree(partial)
            for checkpoint in reversed(self.existing()):
                if not (found := damaged(checkpoint)):
                    break
                kept = checkpoint.with_suffix(".damaged")
                shutil.rmtree(kept, ignore_errors=True)
                checkpoint.rename(kept)
                say(f"{found[0]}: kept as {kept.name}; training goes on from the one before, or from the start")
        self.accelerator.wait_for_everyone()
        if not self.existing():
            return 0, []
        newest = self.existing()[-1]
        written, now = _way_of(newest), self._way()
        if written != now:
            raise ValueError(
                f"{newest} was written {written}, and this is {now}; resume it as it began, or remove {self.folder}"
            )
        self.accelerator.load_state(str(newest))
        history = json.loads((newest / "history.json").read_text())
        return int(newest.name.removeprefix("step_")), history

    def _way(self) -> str:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return f"under DeepSpeed in {self.accelerator.num_processes} processes"  # each reads its own part only
        return "under FSDP2" if self.accelerator.is_fsdp2 else WHOLE

    def save(self, step: int, history: list[dict]) -> None:
        """Write a checkpoint, then remove the oldest beyond the limit. Raises DiskFull; those of before stay."""
        if self.folder is None:
            return
        final = self.folder / f"step_{step:07d}"
        partial = final.with_suffix(".partial")  # one name for all processes, which write into it together
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with explain_write_errors(final):
                self.accelerator.save_state(str(partial), exclude_frozen_parameters=True)  # of DeepSpeed
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    (partial / "history.json").write_text(json.dumps(history))
                    hashes = {str(path.relative_to(partial)): file_hash(path) for path in _files(partial)}
                    (partial / HASHES).write_text(json.dumps(hashes))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # it may hold the last free bytes
            raise
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self.existing()[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _keep_trained(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Leave out weights that nothing trains: they are there before training begins again, and beside an adapter nearly
    all. The names are those of one process, whatever wraps the model in several."""
    for model, state in zip(models, weights, strict=True):
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        names |= {name for name, _ in model.named_buffers()}
        kept = {name.removeprefix(WRAPPED): tensor for name, tensor in state.items() if name in names}
        state.clear()
        state.update(kept)


def _load_trained(models: list[nn.Module], folder: str) -> None:
    """Load what `_keep_trained` left in the place of accelerate, which expects all names, and as they are wrapped."""
    for number, model in enumerate(models):
        path = Path(folder, f"model_{number}.safetensors" if number else "model.safetensors")
        state = {name.removeprefix(WRAPPED): tensor for name, tensor in load_file(path).items()}
        whole = model.module if isinstance(model, DistributedDataParallel) else model
        missing = [name for name, one in whole.named_parameters() if one.requires_grad and name not in state]
        if unknown := missing + whole.load_state_dict(state, strict=False).unexpected_keys:
            raise ValueError(f"{path} is of another model: {unknown[0]} is not in both; remove {Path(folder).parent}")
    models.clear()


def damaged(checkpoint: Path) -> list[str]:
    """What is wrong with its files, a text each."""
    try:
        return damages(checkpoint, read_json(checkpoint / HASHES))
    except (OSError, DamagedFile) as error:
        return [str(error)]


def _files(checkpoint: Path) -> list[Path]:
    """Those that decide how training goes on: all but the random states of the libraries, which it does not use."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [path for path in files if not path.name.startswith("random_states_")]


def _way_of(checkpoint: Path) -> str:
    """How it was written, in the words of `Checkpoints._way`."""
    if any(checkpoint.glob("pytorch_model_fsdp*")):
        return "under FSDP2"
    parts = len(list(checkpoint.glob("pytorch_model/*_optim_states.pt")))
    return f"under DeepSpeed in {parts} processes" if parts else WHOLE
