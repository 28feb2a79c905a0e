"""What people really pass: each case is a command line (or a call) with the files it names, and what must come of it.

A case is refused (`refused`: exit code 2 or 1 and one line on stderr of at most three sentences, before any picture
is drawn) or works (the test compares with a reference value). Cases run in this process, through `main`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (0: it came to its end), what it printed, and what lies in its folder."""

    code: int
    out: str
    err: str
    drawn: list[Path]  # files of pictures and latents it left

    @property
    def message(self) -> str:
        """The last line of stderr, which is the error."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


@pytest.fixture
def command(capsys, tmp_path, monkeypatch) -> Callable[..., Ended]:
    """Run a command by its name with arguments, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *argv: object) -> Ended:
        from importlib import import_module

        main, code = import_module(f"sa_diffusers.cli.{name}").main, 0
        try:
            main([str(argument) for argument in argv])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        drawn = [path for kind in ("*.safetensors", "*.png") for path in (tmp_path / "runs").rglob(kind)]
        return Ended(code, out, err, drawn)

    return run


@pytest.fixture
def refused(command) -> Callable[..., str]:
    """Run a command that must be refused, in one line that holds every one of `says`; returns the line."""

    def run(name: str, *argv: object, says: tuple[str, ...]) -> str:
        ended = command(name, *argv)
        assert ended.code in (1, 2), f"exit code {ended.code}: {ended.err}"
        assert "Traceback" not in ended.err
        assert len(re.findall(r"[.!?](?:\s|$)", ended.message)) <= 3, ended.message
        missing = [part for part in says if part not in ended.message]
        assert not missing, f"expected {missing} in: {ended.message}"
        assert not ended.drawn
        return ended.message

    return run
