"""The tables of the study: all rows, the measures of models, methods at equal forgetting, and the bars."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sa_diffusers.evaluation.intervals import mean_interval
from sa_diffusers.report.tables import markdown_table, measured
from studies.i2i.rows import BY_OUTPUTS, LIMITED, LINES, ONCE, ROWS


GROUPS = ("forget", "retain", "third")
RETAINED_RIVALS = (*BY_OUTPUTS, "random-encoder")
SMILES = ("noise, alpha 0.25", "other, alpha 1")
FIRST, LIMITED_AT = 1.5, 0.65  # forgetting at which methods are compared: times the error before; an error
Found = Mapping[str, Mapping[str, Mapping[str, Any]]]


def table(found: Found) -> str:
    """All tables that the numbers so far make."""
    if not found:
        return ""
    parts = [rows_table(found), probes_table(found), equal_table(found), bars_table(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def rows_table(found: Found) -> str:
    """Means over seeds: masked error and accuracy of each group, Frechet distance, and the error of a new decoder."""
    original = found.get("original") or {"": {"after": next(iter(found.values()))[_seeds(found)[0]]["before"]}}
    rows = [_row("original", original)]
    order = {name: place for place, name in enumerate(ROWS)}  # what is no run stands last
    rest = sorted(found.items(), key=lambda item: order.get(item[0], len(order)))
    rows += [_row(name, runs) for name, runs in rest if name != "original"]
    controls = next(iter(original.values()))["after"].get("fresh_decoder", {})
    for key in ("visible_pixels", "random_encoder"):
        if key in controls:
            rows.append([f"control: {key.replace('_', ' ')}", "", *["–"] * 4, f"{controls[key]:.3f}"])
    header = ("row", "seeds", *(f"{name}: error / accuracy" for name in GROUPS), "FD, forget", "new decoder, forget")
    return markdown_table(header, rows)


def _row(name: str, runs: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    sides = [run["after"] for run in runs.values()]

    def mean(group: str, key: str, spec: str = ".3f") -> str:
        values = [side[group][key] for side in sides if side.get(group, {}).get(key) is not None]
        return f"{np.mean(values):{spec}}" if values else "–"

    pairs = [
        f"{mean(group, 'masked_mse')} / {mean(group, 'accuracy')}" if group in sides[0] else "–" for group in GROUPS
    ]
    return [name, len(runs), *pairs, mean("forget", "frechet_distance", ".0f"), mean("fresh_decoder", "masked_mse")]


PROBES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "SMILE, tau 1 / 5": lambda p: "{tau 1:.2f} / {tau 5:.2f}".format_map(p["smile"]),
    "second generation: accuracy / FD": lambda p: "{accuracy:.2f} / {frechet_distance:.0f}".format_map(
        p["second_generation"]
    ),
    "told from retrained (AUC)": lambda p: p["conspicuousness"],
    "latent search": lambda p: p["latent_search"],
    "relearned": lambda p: p["relearned"],
    "membership (AUC)": lambda p: p["membership"],
    "ring 75 / 50 / 25": lambda p: " / ".join(
        f"{p['curves'][f'ring {side}']['forget']['masked_mse']:.2f}" for side in (75, 50, 25)
    ),
    "left 25 / 50 / 75": lambda p: " / ".join(
        f"{p['curves'][mask]['forget']['masked_mse']:.2f}" for mask in ("left 25", "left", "left 75")
    ),
}


def probes_table(found: Found) -> str:
    """Measures of the pictures to forget, of the first seed of each row that has them."""
    rows = []
    for name, runs in found.items():
        probes = next((run["probes"] for run in runs.values() if "probes" in run), None)
        if probes is None:
            continue
        cells = []
        for read in PROBES.values():
            try:
                cells.append(read(probes))
            except KeyError:  # what there is none of: no fill of a reference, no retrained model
                cells.append(None)
        rows.append([name if name != "noise hole" else "truth and noise", *cells])
        rows += [
            [f"control: {what}", *(probes[key] if head == "latent search" else None for head in PROBES)]
            for key, what in (("random_encoder", "random encoder"), ("visible_pixels", "visible pixels"))
            if key in probes
        ]
    return markdown_table(["pictures to forget", *PROBES], rows, ".3g") if rows else ""


def _seeds(found: Found) -> list[str]:
    return list(dict.fromkeys(seed for runs in found.values() for seed in runs))


def at_forgetting(found: Found, line: str, seed: str, error: float) -> dict[str, float] | None:
    """What a method keeps where it forgets so much: {"retain", "third": error}; None where its rows do not reach it.

    Between two rows it is on the straight line, by the error of pictures to forget.
    """
    sides = [_side(found, row, seed) for row in LINES[line]]
    known = [(side["forget"]["masked_mse"], side) for side in sides if side is not None]
    points = sorted(known, key=lambda point: point[0])
    errors = [point[0] for point in points]
    if len(points) < 2 or not errors[0] <= error <= errors[-1]:
        return None
    return {
        group: float(np.interp(error, errors, [side[group]["masked_mse"] for _, side in points]))
        for group in ("retain", "third")
        if all(group in side for _, side in points)
    }


def _side(found: Found, row: str, seed: str) -> Mapping[str, Any] | None:
    """What was measured of a row: of the model before forgetting by any run of the seed that judges by all."""
    if row != "original":
        return found.get(row, {}).get(seed, {}).get("after")
    known = (runs[seed].get("before") for name, runs in found.items() if seed in runs and name not in ONCE)
    return next((side for side in known if side and side.keys() >= {*GROUPS}), None)


def compared(found: Found, lines: Sequence[str], error: Callable[[Mapping[str, Any]], float]) -> list[list[Any]]:
    """[method, seeds, group: mean error, its difference from the first line's, with a 95 % interval, ...] a method."""
    rows = []
    for line in lines:
        pairs = []
        for seed in _seeds(found):
            before = _side(found, "original", seed)
            both = [before and at_forgetting(found, name, seed, error(before)) for name in (lines[0], line)]
            if all(both):
                pairs.append(both)
        cells: list[Any] = []
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


def equal_table(found: Found) -> str:
    """Every method where it forgets as much, and EWC where few pictures or none are left to retain."""
    header = ("seeds", "retain", "beside the first", "third", "beside the first")
    parts = [
        (f"error of forgotten pictures {FIRST:g} times as before", ("noise", "other", *RETAINED_RIVALS), _first),
        (f"error {LIMITED_AT:g}, no pictures to retain", ("EWC alone", "nothing alone"), lambda before: LIMITED_AT),
        (f"error {LIMITED_AT:g}, 5 a class", ("few pictures, EWC", "few pictures"), lambda before: LIMITED_AT),
    ]
    tables = []
    for heading, lines, error in parts:
        rows = [row for row in compared(found, lines, error) if row[1]]
        tables += [markdown_table((heading, *header), rows, ".3f")] if rows else []
    return "\n\n".join(tables)


def _first(before: Mapping[str, Any]) -> float:
    return FIRST * before["forget"]["masked_mse"]


def bars(found: Found) -> list[tuple[str, str, str, bool]]:
    """(what was asked, the bar, what was found, whether it holds), of what has been measured."""
    rows: list[tuple[str, str, str, bool]] = []
    before = _side(found, "original", _seeds(found)[0])
    if before is None:
        return rows

    def add(what: str, value: float | None, bar: float, least: bool = False) -> None:
        if value is not None:
            sign = ">=" if least else "<="
            rows.append((what, f"{sign} {bar:.3g}", f"{value:.3f}", value >= bar if least else value <= bar))

    def mean(row: str, group: str, key: str = "masked_mse") -> float | None:
        values = [run["after"][group][key] for run in found.get(row, {}).values() if group in run["after"]]
        return float(np.mean(values)) if values else None

    def probed(row: str, read: Callable[[Mapping[str, Any]], Any]) -> float | None:
        values = [read(run["probes"]) for run in found.get(row, {}).values() if "probes" in run]
        return float(np.mean(values)) if values else None

    counts = [before[group]["num_images"] for group in GROUPS]
    for key, bar, least in (("accuracy", 0.88, True), ("masked_mse", 0.30, False)):
        value = np.average([before[group][key] for group in GROUPS], weights=counts)
        add(f"the model before: {key.replace('_', ' ')}", float(value), bar, least)
    further = mean("retain-only", "retain")
    if further is not None:
        add("change of retain error by further training", abs(further / before["retain"]["masked_mse"] - 1), 0.03)
    for number, (group, bar) in enumerate((("retain", 1.08), ("third", 1.2))):
        row = compared(found, ("noise",), _first)[0]
        if row[2 + 2 * number] is not None:
            add(f"noise at {FIRST:g} times: {group}", row[2 + 2 * number] / before[group]["masked_mse"], bar)
    accuracy, retrained = mean("other, alpha 1", "forget", "accuracy"), mean("retrained", "forget", "accuracy")
    add("other, alpha 1: accuracy on forgotten pictures", accuracy, 0.62)
    if accuracy is not None and retrained is not None:
        add("the same: how far from the retrained model's", abs(accuracy - retrained), 0.1)
    seen = [probed(row, lambda p: p.get("conspicuousness", np.nan)) for row in ("other, alpha 1", "noise, alpha 1")]
    if None not in seen and not np.isnan(seen).any():
        add("told from the retrained model's fills (AUC): other, and noise as the bar", seen[0], seen[1])
    for with_ewc, bar in (("few pictures, EWC", 0.90), ("EWC alone", 0.88)):
        rest = [row for row in compared(found, (with_ewc, _WITHOUT[with_ewc]), lambda _: LIMITED_AT) if row[1]]
        if len(rest) == 2 and rest[0][1] == rest[1][1]:  # of the same seeds
            add(f"{with_ewc}: retain error, of that without EWC", rest[0][2] / rest[1][2], bar)
    for tau in ("tau 1", "tau 5"):
        told = {row: probed(row, lambda p, tau=tau: p["smile"][tau]) for row in (*SMILES, "original", "noise hole")}
        for row in SMILES:
            if told[row] is not None and told["original"]:
                add(f"SMILE after / before, {tau}: {row}", told[row] / told["original"], 0.75)
        add(f"SMILE of noise, {tau}", told["noise hole"], 0.0)
    return rows


_WITHOUT = dict(zip(list(LIMITED)[::2], list(LIMITED)[1::2], strict=True))


def bars_table(found: Found) -> str:
    rows = [(*row, "yes" if holds else "**no**") for *row, holds in bars(found)]
    return markdown_table(("asked", "bar", "found", "holds"), rows) if rows else ""
