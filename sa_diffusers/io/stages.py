"""The stages of a forgetting run. Each leaves files, and is reused when those were made with the same key."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sa_diffusers.io.artifacts import Stage, StageMismatch
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.processes import process_state


Result = TypeVar("Result")


class Stages:
    """Runs stages in one output folder and keeps account of what they took and what was reused."""

    def __init__(self, output_dir: Path, overwrite: bool = False):
        self.output_dir, self.overwrite = output_dir, overwrite
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []

    def run(
        self,
        name: str,
        key: dict,
        compute: Callable[[], Result],
        load: Callable[[], Result],
        counts_as: str | None = None,
        workspace: Path | None = None,
    ) -> Result:
        """The stage's result: loaded if the folder holds it under the same key, else computed by all processes.

        Args:
            compute: leaves its files and returns the result; the marker is written after it.
            load: reads these files.
            counts_as: the name under which the seconds are added up; by default the stage's.
            workspace: folder of what is unfinished; emptied first if another key left it.
        """
        state = process_state()
        stage = Stage(self.output_dir, name, key)
        done = self._is_done(stage)
        state.wait_for_everyone()
        if done:
            result, elapsed = load(), stage.seconds
            self.reused.append(name)
        else:
            if state.is_main_process:
                stage.clear()  # the old marker must not vouch for new files if this is interrupted
                if workspace is not None:
                    _claim_workspace(workspace, stage.fingerprint)
            state.wait_for_everyone()
            start = time.perf_counter()
            result = compute()
            state.wait_for_everyone()
            elapsed = time.perf_counter() - start
            if state.is_main_process:
                stage.finish(elapsed)
            state.wait_for_everyone()
        counts_as = counts_as or name
        self.seconds[counts_as] = self.seconds.get(counts_as, 0.0) + elapsed
        return result

    def _is_done(self, stage: Stage) -> bool:
        try:
            return stage.done
        except StageMismatch:
            if not self.overwrite:
                raise
            return False


def _claim_workspace(folder: Path, owner: str) -> None:
    """Keep unfinished work of the same key, to go on with it; discard what another key left."""
    note = folder / "key"
    if note.exists() and note.read_text() == owner:
        return  # without a write, which could fail half way and leave the work to nobody
    if folder.exists():
        shutil.rmtree(folder)
    with atomic_path(note) as temporary:
        temporary.write_text(owner)
