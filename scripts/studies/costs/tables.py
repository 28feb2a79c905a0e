"""Tables of docs/cost.md, of what the benchmark wrote."""

from collections.abc import Mapping
from typing import Any

from sa_diffusers.report.tables import markdown_table
from studies.rows import duration


Found = Mapping[str, Any]  # a benchmark.json


def measured(found: Found) -> str:
    """Stages on the bundled pipeline, each beside the way that it is compared with."""
    rows = [
        [
            row["stage"],
            row["way"],
            f"{row['seconds'] * 1e3:.3g} ms per {row['unit']}",
            "" if row["than"] == row["way"] else f"{row['times_faster']:.2f} times as fast as {row['than']}",
        ]
        for row in found["stages"]
    ]
    return markdown_table(["stage", "way", "time", "compared"], rows)


def whole_runs(found: Found) -> str:
    """Whole runs on the bundled pipeline, extrapolated from these."""
    names = ("sampling", "Fisher", "training", "total")
    rows = [
        [run["run"], run["way"], *(duration(run["seconds"][name]) for name in names)] for run in found["whole_runs"]
    ]
    return markdown_table(["run", "way", *names], rows)


def counted(found: Found) -> str:
    """Times of Stable Diffusion 1.4 at shares of a peak."""
    times = found["times"]
    jobs = list(dict.fromkeys(row["job"] for row in times))
    totals = {(row["share of peak"], row["job"]): row["total"] for row in times}
    rows = [[share, *(totals[share, job] for job in jobs)] for share in dict.fromkeys(share for share, _ in totals)]
    return markdown_table(["share of an H200's dense bf16 peak", *jobs], rows)


def memory(found: Found) -> str:
    """Peaks of training and of the other stages."""
    rows = [[f"training, {row['training']}", f"{row['peak']:.1f} GB"] for row in found["memory"]]
    rows += [[row["stage"], f"{row['peak']:.1f} GB"] for row in found["stage_memory"]]
    return markdown_table(["4 + 4 samples, bf16", "peak"], rows)


def large(sdxl: Found, sd3: Found, flux: Found) -> str:
    """What a LoRA of the large families needs of a card, stage by stage."""
    found = {"sdxl": sdxl, "sd3": sd3, "flux": flux}
    rows = {f"training, {row['training']}": [] for row in found["sdxl"]["memory"]}
    rows |= {"the same, EWC's Fisher in main memory": []} | {row["stage"]: [] for row in found["sdxl"]["stages"]}
    for one in found.values():
        peaks = [*(row["peak"] for row in one["memory"]), one["memory"][-1]["peak, Fisher in main memory"]]
        for cells, peak in zip(rows.values(), peaks + [row["peak"] for row in one["stages"]], strict=True):
            cells.append(f"{peak:.1f} GB")
    rows["needed of a card"] = [f"{one['needed']:.1f} of {one['limit']} GB" for one in found.values()]
    rows["the same, linear layers in 4 bits"] = [f"{one['needed in 4 bits']:.1f} GB" for one in found.values()]
    return markdown_table(["1 + 1 samples", *found], [[name, *cells] for name, cells in rows.items()])


def sdxl_run(found: Found) -> str:
    """A whole run of Stable Diffusion XL on a CPU: what its stages held, beside what is counted."""
    rows = [
        [row["stage"], duration(row["seconds"]), f"{row['measured']:.1f} GB", f"{row['counted']:.1f} GB"]
        for row in found["stages"]
    ]
    return markdown_table(["stage", "time", "measured peak", "counted peak"], rows)


def ewc(found: Found) -> str:
    """What EWC adds to a training step."""
    rows = found["ewc_share"]
    shares = [name for name in rows[0] if name != "samples"]
    cells = [[row["samples"], *(f"{row[share]:.1%}" for share in shares)] for row in rows]
    return markdown_table(["samples in a step", *shares], cells)
