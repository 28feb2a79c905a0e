"""The stages of a run: each has inputs, leaves files, and is reused where those were made with the same key.

A key holds the fingerprints of a stage's inputs, the options that decide its result and the content of files that it
reads, never a path. Since a fingerprint is the key's hash, all keys are known before anything is computed.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from sa_diffusers.io.artifacts import Marker, fingerprint
from sa_diffusers.io.atomic_files import write_text
from sa_diffusers.io.processes import process_state, reporter


T = TypeVar("T")


@dataclass(frozen=True)
class Artifact(Generic[T]):
    """What a stage has made, or would make, the JSON-like value that tells it from others, and what the page says."""

    value: T
    fingerprint: Any
    info: dict[str, Any] = field(default_factory=dict)


class Stage(Generic[T]):
    """One stage of a run, whose context has `options`, the run's `folder`, and `artifacts` by name.

    Attributes:
        name: of the stage, its artifact and its marker.
        counts_as: name under which its seconds are added up.
        inputs: names of artifacts that it takes; those that a run lacks do not count.
        reads: names of those that it takes besides, which decide nothing that its inputs do not.
        fields: names of the options that decide its result.
        leaves: patterns of the files that `load` reads, in the run's folder.
        keeps_work: whether its workspace stays when it is done.
        shown: whether its result is read though nothing that takes it is left to be computed.
        legends: where the folder holds it of another key, parts of the key and what these are made of.
    """

    name: str
    counts_as: str
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    keeps_work: bool = False
    shown: bool = False
    legends: tuple[tuple[str, str], ...] = ()

    def content(self, context: Any) -> dict[str, Any]:
        """What decides its result beside inputs and fields: JSON-like, no path."""
        return {}

    def given(self, context: Any) -> Artifact[T] | None:
        """Its artifact where the user names one. Raises ValueError for one that does not fit."""
        return None

    def compute(self, context: Any) -> T:
        """Leave its files and return its result; called by every process."""
        raise NotImplementedError

    def load(self, context: Any) -> T:
        """Read its result from these files."""
        raise NotImplementedError

    def info(self, result: T) -> dict[str, Any]:
        """What the page says of its result, where that has not been read again."""
        return {}

    def workspace(self, context: Any) -> Path | None:
        """Folder of what is unfinished; it is emptied first if another key left it."""
        return None

    def describe(self, context: Any) -> str:
        """What it does, in a few words."""
        return ""

    def passes(self, context: Any) -> float:
        """Forward passes of the trained module that it costs, about."""
        return 0.0

    def amount(self, context: Any) -> tuple[int, str]:
        """What it works through: a count, and of what."""
        return 0, ""

    def key(self, context: Any) -> dict[str, Any]:
        inputs = {name: context.artifacts[name].fingerprint for name in self.inputs if name in context.artifacts}
        return inputs | {name: getattr(context.options, name) for name in self.fields} | self.content(context)


@dataclass
class Stages:
    """The stages of one run, in their order, and account of what they took and what was reused.

    Args:
        stages: each takes artifacts of earlier ones.
        context: gets their artifacts, at first with fingerprints alone.
        overwrite: compute again what the folder holds of another key.

    Raises:
        StageMismatch: the folder holds a stage of another key.
        DamagedFile: a file that is needed is gone, or not what its stage left.
    """

    stages: Sequence[Stage]
    context: Any
    overwrite: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.markers: dict[str, Marker] = {}
        self.done: set[str] = set()
        for stage in self.stages:
            given = stage.given(self.context)
            if given is not None:
                self.context.artifacts[stage.name] = given
                self.done.add(stage.name)
                continue
            key = stage.key(self.context)
            self.markers[stage.name] = marker = Marker(self.context.folder, stage.name, key, legends=stage.legends)
            self.context.artifacts[stage.name] = Artifact(None, marker.fingerprint)
            if marker.done(self.overwrite):
                self.done.add(stage.name)
        needed: set[str] = set()
        for stage in reversed(self.stages):
            if stage.name in needed or stage.name not in self.done:
                needed.update((*stage.inputs, *stage.reads))
        self.read = needed | {stage.name for stage in self.stages if stage.shown}
        for name in self.done & self.read & self.markers.keys():
            self.markers[name].check()
        process_state().wait_for_everyone()

    @property
    def left(self) -> list[str]:
        """Names of the stages that the folder does not hold."""
        return [stage.name for stage in self.stages if stage.name not in self.done]

    def run(self, stage: Stage[T]) -> T | None:
        """The stage's result: given, loaded if the folder holds it under its key, else computed by all processes.

        None where the folder holds it and nothing needs it any more.
        """
        if stage.name not in self.markers:
            self.reused.append(stage.name)
            reporter().end(stage.name, 0.0, *stage.amount(self.context), reused=True)
            return self.context.artifacts[stage.name].value
        marker = self.markers[stage.name]
        if stage.name in self.done:
            self._discard_work(stage)  # which a kill may have left
            result = stage.load(self.context) if stage.name in self.read else None
            elapsed = marker.seconds
            self.reused.append(stage.name)
        else:
            reporter().begin(stage.name, stage.describe(self.context))
            result, elapsed = self._compute(stage, marker)
        self.seconds[stage.counts_as] = self.seconds.get(stage.counts_as, 0.0) + elapsed
        self.context.artifacts[stage.name] = Artifact(result, marker.fingerprint, marker.info)
        count, of = stage.amount(self.context)
        reporter().end(stage.name, elapsed, count, of, stage.name in self.done)
        return result

    def _compute(self, stage: Stage[T], marker: Marker) -> tuple[T, float]:
        state, workspace = process_state(), stage.workspace(self.context)
        if state.is_main_process:
            marker.clear()  # the old marker must not vouch for new files if this is interrupted
            if workspace is not None:
                _claim_workspace(workspace, marker.fingerprint)
        state.wait_for_everyone()
        start = time.perf_counter()
        result = stage.compute(self.context)
        state.wait_for_everyone()
        elapsed = time.perf_counter() - start
        if state.is_main_process:
            files = [path for pattern in stage.leaves for path in marker.output_dir.glob(pattern) if path.is_file()]
            marker.finish(elapsed, files, stage.info(result))
            self._discard_work(stage)  # only now that a marker vouches for what came of it
        state.wait_for_everyone()
        return result, elapsed

    def _discard_work(self, stage: Stage) -> None:
        workspace = stage.workspace(self.context)
        if workspace is not None and not stage.keeps_work and process_state().is_main_process:
            shutil.rmtree(workspace, ignore_errors=True)


def content_fingerprint(value: Any) -> str:
    """The fingerprint of something JSON-like that is not a mapping."""
    return fingerprint({"content": value})


def _claim_workspace(folder: Path, owner: str) -> None:
    """Keep unfinished work of the same key, to go on with it; discard what another key left."""
    note = folder / "key"
    if note.exists() and note.read_text() == owner:
        return  # without a write, which could fail half way and leave the work to nobody
    if folder.exists():
        shutil.rmtree(folder)
    write_text(owner, note)
