"""The tables of the study: all rows, the measures of models, methods at equal forgetting, and the bars."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sa_diffusers.evaluation.intervals import mean_interval
from sa_diffusers.report.tables import markdown_table, measured
from studies.i2i.rows import BY_OUTPUTS, DEFAULT, KINDS, LIMITED, LINES, ONCE, ROWS, SPARSER, Kind


GROUPS = ("forget", "retain", "third")
RETAINED_RIVALS = (*BY_OUTPUTS, "random-encoder", SPARSER)
SMILES = ("noise, alpha 0.25", "other, alpha 1")
Found = Mapping[str, Mapping[str, Mapping[str, Any]]]
Before = Mapping[str, Any]  # what was measured of the model before forgetting


def table(found: Found) -> str:
    """All tables that the numbers so far make."""
    if not found:
        return ""
    parts = [rows_table(found), probes_table(found), equal_table(found), bars_table(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def kind_of(found: Found) -> Kind:
    """What goes by the family that was studied; runs that do not say are of the first one."""
    names = (run["family"] for runs in found.values() for run in runs.values() if "family" in run)
    return KINDS[next(names, DEFAULT)]


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
    header = (
        kind_of(found).title,
        "seeds",
        *(f"{name}: error / accuracy" for name in GROUPS),
        "FD, forget",
        "new decoder, forget",
    )
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
    "quarter / random": lambda p: " / ".join(
        f"{p['curves'][mask]['forget']['masked_mse']:.2f}" for mask in ("quarter", "random")
    ),
    "left 25 / 50 / 75": lambda p: " / ".join(
        f"{p['curves'][mask]['forget']['masked_mse']:.2f}" for mask in ("left 25", "left", "left 75")
    ),
}


def probes_table(found: Found) -> str:
    """Measures of the pictures to forget, and how alike fills are to the truth; means over seeds."""
    rows, title = [], kind_of(found).title
    for name, runs in found.items():
        probes = _mean([run["probes"] for run in runs.values() if "probes" in run])
        if not probes:
            continue
        cells = []
        for read in PROBES.values():
            try:
                cells.append(read(probes))
            except KeyError:  # what there is none of: no fill of a reference, no retrained model
                cells.append(None)
        rows.append([name if name != "noise hole" else "truth and noise", *cells])
        for key in ("random_encoder", "visible_pixels"):
            known = {"latent search": probes.get(key), "membership (AUC)": probes.get("membership_of", {}).get(key)}
            if any(value is not None for value in known.values()):
                rows.append([f"control: {key.replace('_', ' ')}", *map(known.get, PROBES)])
    said = [place for place in range(1 + len(PROBES)) if any(row[place] is not None for row in rows)]
    header = [f"{title}: pictures to forget", *PROBES]
    tables = (
        [markdown_table([header[i] for i in said], [[row[i] for i in said] for row in rows], ".3g")] if rows else []
    )
    return "\n\n".join([*tables, *_alike(found, title)])


def _alike(found: Found, title: str) -> list[str]:
    """A table of measures beside the error, of the rows that have them."""
    rows = []
    for name, runs in found.items():
        side = _mean([run["after"] for run in runs.values() if "psnr" in run["after"].get("forget", {})])
        known = [side.get(group, {}) for group in GROUPS]
        if side:
            told = "{psnr:.1f} / {feature_cosine:.3f}"
            rows.append([name, *(told.format_map(v) if "psnr" in v else None for v in known)])
            rows[-1] += [v.get("classifier_score") for v in known]
    header = [f"{group}: PSNR (dB) / cosine" for group in GROUPS] + [f"{group}: score" for group in GROUPS]
    return [markdown_table([title, *header], rows, ".2f")] if rows else []


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of what stands under each key of dicts, where it does."""
    if not values or not isinstance(values[0], Mapping):
        return float(np.mean(values)) if values else {}
    parts = {key: [one[key] for one in values if one.get(key) is not None] for one in values for key in one}
    return {key: _mean(part) for key, part in parts.items() if part}


def _seeds(found: Found) -> list[str]:
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
    sides = {seed: _side(found, "original", seed) for seed in _seeds(found)}
    return {seed: side for seed, side in sides.items() if side is not None}


Forgetting = Callable[[Before], float]


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
    parts = [
        (f"error of forgotten pictures {kind.factor:g} times as before", ("noise", "other", *RETAINED_RIVALS), first),
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


class Bars:
    """What was asked, the bar, what was found, whether it holds: rows as they are added."""

    def __init__(self, found: Found):
        self.found, self.rows = found, []
        self.kind, self.befores = kind_of(found), befores(found)

    def add(self, what: str, value: float | None, bar: float, least: bool = False, spec: str = ".3f") -> None:
        """A row, unless there is no value."""
        if value is not None:
            sign = ">=" if least else "<="
            self.rows.append((what, f"{sign} {bar:.3g}", f"{value:{spec}}", value >= bar if least else value <= bar))

    def of(self, rows: Sequence[str], *keys: str) -> list[tuple[float, ...]]:
        """What stands in the runs of rows under keys, of each seed where it does in all of them."""
        found = []
        for seed in _seeds(self.found):
            values: list[Any] = [self.found.get(row, {}).get(seed) for row in rows]
            for key in keys:
                values = [value.get(key) if value is not None else None for value in values]
            if all(value is not None for value in values):
                found.append(tuple(values))
        return found

    def means(self, rows: Sequence[str], *keys: str) -> list[float] | None:
        """The mean of each row over these seeds; None where there are none."""
        known = self.of(rows, *keys)
        return [float(np.mean(part)) for part in zip(*known, strict=True)] if known else None

    def base(self) -> None:
        """The model before, and whether it is trained out."""
        for key, bar, least in self.kind.base:
            values = [
                np.average([b[g][key] for g in GROUPS], weights=[b[g]["num_images"] for g in GROUPS])
                for b in self.befores.values()
            ]
            self.add(f"the model before: {key.replace('_', ' ')}", float(np.mean(values)), bar, least)
        further = [
            run["after"]["retain"]["masked_mse"] / self.befores[seed]["retain"]["masked_mse"]
            for seed, run in self.found.get("retain-only", {}).items()
            if seed in self.befores and "retain" in run["after"]
        ]
        if further:
            self.add("change of retain error by further training", abs(float(np.mean(further)) - 1), 0.03)

    def equal(self) -> None:
        """What is kept where as much is forgotten."""
        first, limited = forgettings(self.kind)
        lead = f"noise at {self.kind.factor:g} times"

        def kept(group: str, key: str) -> list[tuple[float, float]]:
            reached = {
                seed: at_forgetting(self.found, "noise", seed, first(b), key) for seed, b in self.befores.items()
            }
            return [
                (found[group], self.befores[s][group][key]) for s, found in reached.items() if group in (found or ())
            ]

        for group, bar in (("retain", 1.08), ("third", 1.2)):
            if errors := kept(group, "masked_mse"):
                self.add(f"{lead}: {group}", float(np.mean([its / before for its, before in errors])), bar)
        if read := kept("retain", "accuracy"):
            its, before = np.mean(read, axis=0).tolist()
            self.add(f"{lead}: retain accuracy", its, before - 0.02, least=True)
        if (cells := better(self.found, first)) is not None:
            named = f" ({'; '.join(cells)})" if cells else ""
            self.add(f"where a rival keeps more at {self.kind.factor:g} times{named}", len(cells), 1, spec="d")
        for with_ewc, bar in (("few pictures, EWC", 0.90), ("EWC alone", 0.88)):
            rest = [row for row in compared(self.found, (with_ewc, _WITHOUT[with_ewc]), limited) if row[1]]
            if len(rest) == 2 and rest[0][1] == rest[1][1]:  # of the same seeds
                self.add(f"{with_ewc}: retain error, of that without EWC", rest[0][2] / rest[1][2], bar)

    def probed(self) -> None:
        """What fills show and tell."""
        read = self.means(["other, alpha 1"], "after", "forget", "accuracy")
        if read and self.kind.fooled:
            self.add("other, alpha 1: accuracy on forgotten pictures", read[0], self.kind.fooled)
        if pair := self.means(["other, alpha 1", "retrained"], "after", "forget", "accuracy"):
            self.add("the same: how far from the retrained model's", abs(pair[0] - pair[1]), 0.1)
        if seen := self.means(["other, alpha 1", "noise, alpha 1"], "probes", "conspicuousness"):
            self.add("told from the retrained model's fills (AUC): other, and noise as the bar", *seen)
        for tau in ("tau 1", "tau 5"):
            for row in SMILES:
                if told := self.means([row, "original"], "probes", "smile", tau):
                    self.add(f"SMILE after / before, {tau}: {row}", told[0] / told[1], 0.75)
            if noise := self.means(["noise hole"], "probes", "smile", tau):
                self.add(f"SMILE of noise, {tau}", noise[0], 0.0)


def bars(found: Found) -> list[tuple[str, str, str, bool]]:
    """(what was asked, the bar, what was found, whether it holds), of what has been measured."""
    made = Bars(found)
    if made.befores:
        made.base()
        made.equal()
        made.probed()
    return made.rows


_WITHOUT = dict(zip(list(LIMITED)[::2], list(LIMITED)[1::2], strict=True))


def bars_table(found: Found) -> str:
    rows = [(*row, "yes" if holds else "**no**") for *row, holds in bars(found)]
    return markdown_table((f"asked of the {kind_of(found).title}", "bar", "found", "holds"), rows) if rows else ""
