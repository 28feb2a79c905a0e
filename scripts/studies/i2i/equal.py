"""Methods compared where they forget as much, between the rows of each on a straight line."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sa_diffusers.evaluation.intervals import mean_interval
from sa_diffusers.report.tables import markdown_table, measured
from studies.i2i.rows import BY_OUTPUTS, DEFAULT, KINDS, LINES, ONCE, SELECTIVE, SPARSER, Kind


GROUPS = ("forget", "retain", "third")
RETAINED_RIVALS = (*BY_OUTPUTS, "random-encoder", SPARSER)
Found = Mapping[str, Mapping[str, Mapping[str, Any]]]
Before = Mapping[str, Any]  # what was measured of the model before forgetting
Forgetting = Callable[[Before], float]  # the error of pictures to forget at which methods are compared


def kind_of(found: Found) -> Kind:
    """What goes by the family that was studied; runs that do not say are of the first one."""
    names = (run["family"] for runs in found.values() for run in runs.values() if "family" in run)
    return KINDS[next(names, DEFAULT)]


def seeds_of(found: Found) -> list[str]:
    return list(dict.fromkeys(seed for runs in found.values() for seed in runs))


def at_forgetting(
    found: Found, line: str, seed: str, error: float, key: str = "masked_mse"
) -> dict[str, float] | None:
    """What a method keeps where it forgets so much: {"retain", "third": measure}; None where its rows do not reach it.

    Between two rows it is on the straight line, by the error of pictures to forget.
    """
    sides = [_side(found, row, seed) for row in LINES[line]]
    known = [(side["forget"]["masked_mse"], side) for side in sides if side is not None]
    points = sorted(known, key=lambda point: point[0])
    errors = [point[0] for point in points]
    if len(points) < 2 or not errors[0] <= error <= errors[-1]:
        return None
    return {
        group: float(np.interp(error, errors, [side[group][key] for _, side in points]))
        for group in ("retain", "third")
        if all(side.get(group, {}).get(key) is not None for _, side in points)
    }


def _side(found: Found, row: str, seed: str) -> Mapping[str, Any] | None:
    """What was measured of a row: of the model before forgetting by any run of the seed that judges by all."""
    if row != "original":
        return found.get(row, {}).get(seed, {}).get("after")
    known = (runs[seed].get("before") for name, runs in found.items() if seed in runs and name not in ONCE)
    return next((side for side in known if side and side.keys() >= {*GROUPS}), None)


def befores(found: Found) -> dict[str, Before]:
    """{seed: what was measured of the model before forgetting}."""
    sides = {seed: _side(found, "original", seed) for seed in seeds_of(found)}
    return {seed: side for seed, side in sides.items() if side is not None}


def paired(
    found: Found, first: str, line: str, error: Forgetting, key: str = "masked_mse"
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """What two methods keep where they forget as much, of every seed where both reach that."""
    pairs = []
    for seed, before in befores(found).items():
        both = [at_forgetting(found, name, seed, error(before), key) for name in (first, line)]
        if all(both):
            pairs.append(tuple(both))
    return pairs


def compared(found: Found, lines: Sequence[str], error: Forgetting, key: str = "masked_mse") -> list[list[Any]]:
    """[method, seeds, group: mean, its difference from the first line's, with a 95 % interval, ...] of each method."""
    rows = []
    for line in lines:
        pairs, cells = paired(found, lines[0], line, error, key), []
        for group in ("retain", "third"):
            known = [(ours[group], its[group]) for ours, its in pairs if group in ours and group in its]
            differences = [its - ours for ours, its in known]
            cells.append(float(np.mean([its for _, its in known])) if known else None)
            cells.append(
                measured(float(np.mean(differences)), mean_interval(differences), "+.3f")
                if known and line != lines[0]
                else None
            )
        rows.append([line, len(pairs), *cells])
    return rows


def better(found: Found, error: Forgetting) -> list[str] | None:
    """Where a rival does less damage than noise, outside the interval: "max-loss, third"; None: of too few seeds."""
    cells, several = [], False
    for line in RETAINED_RIVALS:
        pairs = paired(found, "noise", line, error)
        for group in ("retain", "third"):
            differences = [its[group] - ours[group] for ours, its in pairs if group in ours and group in its]
            interval = mean_interval(differences) if differences else None
            several |= interval is not None
            if interval is not None and interval[1] < 0:
                cells.append(f"{line}, {group}")
    return cells if several else None


def equal_table(found: Found) -> str:
    """Every method where it forgets as much, and EWC where few pictures or none are left to retain."""
    kind = kind_of(found)
    first, limited = forgettings(kind)
    header = ("seeds", "retain", "beside the first", "third", "beside the first", "retain: accuracy")
    at = f"error {kind.limited:g}" if kind.limited else f"error {kind.factor:g} times as before"
    lines = ("noise", "other", "bounded", *RETAINED_RIVALS, *SELECTIVE)
    parts = [
        (f"error of forgotten pictures {kind.factor:g} times as before", lines, first),
        (f"{at}, no pictures to retain", ("EWC alone", "nothing alone"), limited),
        (f"{at}, 5 a class", ("few pictures, EWC", "few pictures"), limited),
    ]
    tables = []
    for heading, lines, error in parts:
        read = {row[0]: row[2] for row in compared(found, lines, error, "accuracy")}
        rows = [[*row, read[row[0]]] for row in compared(found, lines, error) if row[1]]
        tables += [markdown_table((f"{kind.title}: {heading}", *header), rows, ".3f")] if rows else []
    return "\n\n".join(tables)


def forgettings(kind: Kind) -> tuple[Forgetting, Forgetting]:
    """The errors of pictures to forget at which methods are compared: with all pictures to retain, and with few."""

    def first(before: Before) -> float:
        return kind.factor * before["forget"]["masked_mse"]

    return first, (lambda before: kind.limited) if kind.limited else first
