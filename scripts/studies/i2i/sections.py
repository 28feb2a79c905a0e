"""The tables of the study: all rows, the measures of models, methods at equal forgetting, and the bars."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sa_diffusers.report.tables import markdown_table
from studies.i2i.bars import bars_table
from studies.i2i.equal import GROUPS, Found, equal_table, kind_of, seeds_of
from studies.i2i.rows import ROWS


def table(found: Found) -> str:
    """All tables that the numbers so far make."""
    if not found:
        return ""
    parts = [rows_table(found), probes_table(found), equal_table(found), bars_table(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def rows_table(found: Found) -> str:
    """Means over seeds: masked error and accuracy of each group, Frechet distance, and the error of a new decoder,
    before and after: it is fitted to a run's own pictures, so that of others it says nothing."""
    original = found.get("original") or {"": {"after": next(iter(found.values()))[seeds_of(found)[0]]["before"]}}
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
        "new decoder, forget: before → after",
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
    after, befores = mean("fresh_decoder", "masked_mse"), [run.get("before") or {} for run in runs.values()]
    known = [side["fresh_decoder"]["masked_mse"] for side in befores if "fresh_decoder" in side]
    decoded = f"{np.mean(known):.3f} → {after}" if known and after != "–" else after
    return [name, len(runs), *pairs, mean("forget", "frechet_distance", ".0f"), decoded]


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
