"""What the study was to show, and whether it holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sa_diffusers.report.tables import markdown_table
from studies.i2i.equal import GROUPS, Found, at_forgetting, befores, better, compared, forgettings, kind_of, seeds_of


SMILES = ("noise, alpha 0.25", "other, alpha 1")


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
        for seed in seeds_of(self.found):
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
        held = ("few pictures, EWC", "few pictures", 0.90), ("EWC alone", "nothing alone", 0.88)
        for with_ewc, without, bar in held:
            rest = [row for row in compared(self.found, (with_ewc, without), limited) if row[1]]
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


def bars_table(found: Found) -> str:
    rows = [(*row, "yes" if holds else "**no**") for *row, holds in bars(found)]
    return markdown_table((f"asked of the {kind_of(found).title}", "bar", "found", "holds"), rows) if rows else ""
