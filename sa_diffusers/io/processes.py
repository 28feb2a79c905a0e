"""Which process this is, of how many, its device, and what it tells while it works (docs/events.md lists it all)."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging


Event = dict[str, Any]  # "time", "event" (which kind), "stage" where one is at work, and what belongs to the kind
Listener = Callable[[Event], object]  # returning False asks to stop


def process_state() -> PartialState:
    """Accelerate's state of this process; it honours ACCELERATE_USE_CPU, which PartialState alone ignores."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def processes_part() -> Iterator[None]:
    """Leave the process group after the block, with gloo's threads at rest.

    Such a thread frees the tensors of the last message shortly after it came. That needs the interpreter, and aborts
    the process where the interpreter has begun to end; neither torch nor Python waits for these threads.
    """
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.5)  # in which the interpreter is theirs


class RunStopped(RuntimeError):
    """A listener has asked to stop; with an output_dir the same call goes on from what was finished."""


class Terminal:
    """A bar while something is worked at, or a line now and then where no terminal shows bars; a line at its end.

    Args:
        interval: seconds between such lines.
    """

    def __init__(self, interval: float = 60):
        self.interval, self.bar = interval, None
        self.what, self.shown, self.loss = "", 0.0, ""

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "progress":
            self._show(event)
        elif kind == "losses":
            self.loss = f"loss={event['loss']:.4g}"
            if self.bar is not None:
                self.bar.set_postfix_str(self.loss)
        elif kind in ("ended", "message", "error"):
            self._close()
            if kind == "message":
                print(event["text"], flush=True)
            elif kind == "ended":
                amount = f", {event['count']:,} {event['of']}" if event.get("count") else ""
                took = "reused" if event["reused"] else f"{event['seconds']:.1f} s"
                print(f"  {event['stage']}: {took}{amount}", flush=True)

    def _show(self, event: Event) -> None:
        what, unit, now = event["what"], event["unit"], time.monotonic()
        if what != self.what:
            if self.what:
                self._close()
            self.what, self.shown = what, now
        if sys.stderr.isatty():
            if self.bar is None:
                options = {"desc": what, "unit": f" {unit}", "mininterval": 1, "leave": False}
                self.bar = tqdm(total=event["of"], initial=event["from"], **options)
            self.bar.update(event["done"] - self.bar.n)
        elif now - self.shown >= self.interval and event["done"] < event["of"]:
            left = timedelta(seconds=round(event["seconds_left"]))
            done = f"{event['done']:,} of {event['of']:,} {unit}".rstrip()
            print(
                f"  {what}: {', '.join(filter(None, (done, self.loss, f'{left} left')))}", file=sys.stderr, flush=True
            )
            self.shown = now

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.what, self.loss = None, "", ""


class Reporter:
    """Hands every event to all who listen; of several processes the main one does."""

    def __init__(self, *listeners: Listener):
        self.listeners, self.stage = listeners, None
        self.work: Work | None = None

    def tell(self, event: str, **said: Any) -> None:
        """Raises RunStopped where a listener returns False."""
        if not self.listeners or int(os.environ.get("RANK", 0)):
            return
        stage = {} if self.stage is None else {"stage": self.stage}
        whole = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **stage, **said}
        answers = [listener(whole) for listener in self.listeners]
        if False in answers and event != "error":
            raise RunStopped(
                "stopped by the callback; where there is an output_dir, the same call goes on from what was finished"
            )

    def begin(self, stage: str, does: str = "") -> None:
        self.stage = stage
        self.tell("begun", does=does)

    def end(self, stage: str, seconds: float, count: int = 0, of: str = "", reused: bool = False) -> None:
        self.stage = stage
        try:
            self.tell("ended", seconds=round(seconds, 3), count=count, of=of, reused=reused)
        finally:
            self.stage = None


class Work:
    """How far a piece of work is: told when it is done, and at most once a second before."""

    def __init__(self, reporter: Reporter, what: str, total: int, unit: str, start: int = 0):
        self.reporter, self.what, self.total, self.unit = reporter, what, total, unit
        self.start, self.done, self.began = start, start, time.monotonic()
        self.told = self.began

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.told < 1:
            return
        self.told, new = now, self.done - self.start
        left = round((now - self.began) / new * (self.total - self.done), 1) if new > 0 else None
        said = {"what": self.what, "from": self.start, "done": self.done, "of": self.total, "unit": self.unit}
        self.reporter.tell("progress", **said, seconds_left=left)


_reporter = Reporter(Terminal())


def tell(event: str, **said: Any) -> None:
    """Tell whoever listens. Raises RunStopped."""
    _reporter.tell(event, **said)


def say(text: str) -> None:
    """A line for people."""
    _reporter.tell("message", text=text)


def reporter() -> Reporter:
    """The one in use."""
    return _reporter


@contextmanager
def working(what: str, total: int, unit: str = "", start: int = 0) -> Iterator[Callable[..., None]]:
    """Tell how far it is by the function it yields, which takes how many units more are done (1).

    Inside other work it adds to that if the unit is the same, and else is silent: as pictures while training.
    """
    outer, current = _reporter.work, _reporter
    if outer is not None:
        yield outer.advance if outer.unit == unit else lambda count=1: None
        return
    current.work, alone = Work(current, what, total, unit, start), current.stage is None
    if alone:
        current.begin(what)
    try:
        yield current.work.advance
    finally:
        done, began, current.work = current.work.done - start, current.work.began, None
        if alone:
            current.stage = None
    if alone:
        current.end(what, time.monotonic() - began, done, unit)


def progress_bar(items: Iterable, what: str, unit: str = "") -> Iterator:
    """The items one after the other, telling how far they are; see `working`."""
    items = items if hasattr(items, "__len__") else list(items)
    with working(what, len(items), unit) as advance:
        for item in items:
            yield item
            advance()


class _FirstCuts(logging.Filter):
    """Of diffusers' notices that a prompt was cut, one for each long prompt, the first of each length that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        notice, _, cut = record.getMessage().partition("[")
        if not cut or "truncated" not in notice:
            return True
        known = notice in self.said
        self.said.add(notice)
        return not known


@contextmanager
def reporting(
    quiet: bool = False, log_json: str | Path | None = None, callback: Listener | None = None
) -> Iterator[None]:
    """Within the block events go to the terminal, the end of a file as lines of JSON, and a callback, as asked for.

    Args:
        quiet: neither lines nor bars, those of the libraries included; warnings and errors stay.

    Raises:
        ValueError: the file cannot be written.
    """
    global _reporter
    before, libraries = _reporter, (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    barless = quiet or not sys.stderr.isatty()  # to a file a bar is a line at every change
    with ExitStack() as stack:
        listeners: list[Listener] = [] if quiet else [one for one in before.listeners if isinstance(one, Terminal)]
        if log_json is not None:
            try:
                file = stack.enter_context(open(log_json, "a", encoding="utf-8", buffering=1))
            except OSError as error:
                raise ValueError(f"cannot write {log_json}: {error.strerror}; pass another --log_json") from error
            listeners.append(lambda event: print(json.dumps(event, default=str), file=file))
        listeners += [callback] if callback is not None else []
        _reporter = Reporter(*listeners)
        for handler in diffusers_logging.get_logger("diffusers").handlers:
            handler.addFilter(first_cuts := _FirstCuts())
            stack.callback(handler.removeFilter, first_cuts)
        try:
            for library in shown if barless else ():
                library.disable_progress_bar()
            yield
        except BaseException as error:
            _reporter.tell("error", kind=type(error).__name__, text=str(error))
            raise
        finally:
            _reporter = before
            for library in shown:
                library.enable_progress_bar()
