"""Checkpoints of the optimisation loop: complete or absent, a limited number of them."""

import json
import shutil
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LRScheduler


class Checkpoints:
    """Checkpoints of one optimisation: `step_<n>` folders, complete or absent, the newest `limit` kept."""

    def __init__(
        self, accelerator: Accelerator, folder: Path | None, limit: int, scheduler: LRScheduler, ema: EMAModel | None
    ):
        self.accelerator, self.folder, self.limit = accelerator, folder, limit
        accelerator.register_for_checkpointing(scheduler, *([] if ema is None else [ema]))
        self.ema = ema

    def existing(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        return sorted(self.folder.glob("step_*[0-9]")) if self.folder is not None else []

    def resume(self) -> tuple[int, list[dict]]:
        """Load the newest checkpoint; returns the step to start with and the history so far."""
        if not self.existing():
            return 0, []
        newest = self.existing()[-1]
        self.accelerator.load_state(str(newest))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        history = json.loads((newest / "history.json").read_text())
        return int(newest.name.removeprefix("step_")), history

    def save(self, step: int, history: list[dict]) -> None:
        """Write a checkpoint beside its final name, then rename it, then remove the oldest beyond the limit."""
        if self.folder is None:
            return
        final = self.folder / f"step_{step:07d}"
        partial = final.with_suffix(".partial")  # one name for all processes, which write into it together
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / "history.json").write_text(json.dumps(history))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self.existing()[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
