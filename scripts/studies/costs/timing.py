"""Seconds and peak memory of several ways of doing the same work, which take turns so that other load hits all."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sa_diffusers.models.memory import TensorBytes


@dataclass(frozen=True)
class Way:
    """One way of doing a piece of work.

    Attributes:
        stage, name: what is done, and how.
        unit: what is counted, such as "image".
        count: units that one `run` does.
        run: does them.
        held: the tensors it keeps between two runs: weights, optimiser state, Fisher.
        against: name of the way that it is compared with; None: the first of its stage.
    """

    stage: str
    name: str
    unit: str
    count: int
    run: Callable[[], Any]
    held: Callable[[], Iterable[Tensor]] = tuple
    against: str | None = None


def unique_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the storages of the tensors on this device, each storage once."""
    storages = [t.untyped_storage() for t in tensors if t.device.type == device.type]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def peak_bytes(way: Way, device: torch.device) -> int:
    """What a way holds between two runs, and the most that one run allocates beside it.

    On a GPU that is what the allocator says. On a CPU it is the tensors alone (`TensorBytes`): a process's resident
    memory is nearly all libraries, and stays after tensors have gone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way.run()
        torch.cuda.synchronize(device)
        made = torch.cuda.max_memory_allocated(device) - before
    else:
        with TensorBytes() as counter:
            way.run()
        made = counter.peak
    return made + unique_bytes(way.held(), device)


def measure(ways: list[Way], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a way: the median seconds a unit, how much faster than what it is compared with, and peak bytes.

    The ways take turns, A B C A B C, after one run of each that warms up. How much faster is the median over the
    rounds of the ratio within a round, which other load on the machine hits least.

    Raises:
        ValueError: no round.
    """
    if rounds < 1:
        raise ValueError(f"expected at least one round, got {rounds}")
    for way in ways:
        way.run()
    peaks = [peak_bytes(way, device) for way in ways]
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            _synchronise(device)
            start = time.perf_counter()
            way.run()
            _synchronise(device)
            seconds[way.name].append((time.perf_counter() - start) / way.count)
    rows = []
    for way, peak in zip(ways, peaks, strict=True):
        pairs = zip(seconds[way.against or ways[0].name], seconds[way.name], strict=True)
        rows.append(
            {
                "stage": way.stage,
                "way": way.name,
                "unit": way.unit,
                "seconds": median(seconds[way.name]),
                "times_faster": median(other / own for other, own in pairs),
                "than": way.against or ways[0].name,
                "peak_bytes": peak,
                "rounds": seconds[way.name],
            }
        )
    return rows


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
