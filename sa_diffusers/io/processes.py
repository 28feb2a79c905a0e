"""Which process this is, of how many, its device, and what it says while it works."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging


_quiet = False


def process_state() -> PartialState:
    """Accelerate's state of this process; it honours ACCELERATE_USE_CPU, which PartialState alone ignores."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def say(text: str) -> None:
    """Print a line, of the main process alone, unless `quiet`."""
    if process_state().is_main_process and not _quiet:
        print(text, flush=True)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A bar of the main process, unless `quiet`; options as of tqdm."""
    return tqdm(iterable, disable=_quiet or not process_state().is_main_process, mininterval=1, **options)


@contextmanager
def quiet(asked: bool = True) -> Iterator[None]:
    """Within the block neither lines nor bars, those of the libraries included; warnings and errors stay."""
    global _quiet
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    before, _quiet = _quiet, _quiet or asked
    try:
        for library in libraries if _quiet else ():
            library.disable_progress_bar()
        yield
    finally:
        _quiet = before
        for library in libraries:
            library.enable_progress_bar()
