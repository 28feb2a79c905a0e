"""Forgetting in a masked autoencoder, its surrogates and rivals, on pictures of digits: the runs and their table."""

import json
from dataclasses import dataclass
from pathlib import Path

from sa_diffusers.families import family_defaults
from sa_diffusers.io.atomic_files import write_json, write_text
from sa_diffusers.io.configuration import Options, config_from_dict, layered, option, read_values
from sa_diffusers.io.loading import read_model_index
from sa_diffusers.report.tables import markdown_table
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig


FORGOTTEN, RETAINED, THIRD = "2,5,8", "0,1,3,4", "6,7,9"
OTHER = {"surrogate": "other"}
BARE = {"retain_images": None, "forget_alpha": 1.0, "num_train_steps": 80, "train_batch_size": 16}
FISHER = {"fisher_images": RETAINED}
# row: what it changes of bundled/digits_inpaint with all steps
ROWS: dict[str, dict] = {
    **{f"noise, alpha {alpha:g}": {"forget_alpha": alpha} for alpha in (0.02, 0.03, 0.05, 0.25, 1.0)},
    **{f"other, alpha {alpha:g}": OTHER | {"forget_alpha": alpha} for alpha in (0.05, 0.25, 1.0)},
    **{f"{kind}, alpha 0.25": {"surrogate": kind} for kind in ("nearest", "mean", "blur")},
    "proxy: third retained": {"retain_images": THIRD, "other_images": RETAINED},
    **{f"max-loss, alpha {alpha:g}": {"method": "max-loss", "forget_alpha": alpha} for alpha in (0.02, 0.05, 0.25)},
    **{f"{name}, alpha 1": {"method": name, "forget_alpha": 1.0} for name in ("noisy-label", "retain-label")},
    "random-encoder, alpha 1": {"method": "random-encoder", "forget_alpha": 1.0},
    "retain-only": {"method": "retain-only"},
    **{f"EWC alone, lambda {weight:g}": BARE | FISHER | {"ewc_lambda": weight} for weight in (1e-3, 1.0, 10.0, 100.0)},
    "few pictures, no EWC": BARE | {"retain_images": RETAINED, "images_class": 5},
    "few pictures, EWC": BARE | FISHER | {"retain_images": RETAINED, "images_class": 5, "ewc_lambda": 10.0},
}
GROUPS = ("forget", "retain", "third")


@dataclass
class I2IConfig(Options):
    """Everything `scripts/i2i_study.py` can be told."""

    pictures: str = option("bundled/digits_inpaint", "Data set of digits, as of scripts/compose_digit_pictures.py.")
    output_dir: str = option("runs/i2i_study", "Folder of the runs, study.json and study.md.")
    only: str | None = option(None, "Rows to run that contain this text; null: all.")
    seeds: list[int] = option([0], "Seeds of each row.")
    num_train_steps: int = option(150, "Optimiser steps of rows that do not say.", above=0)


def run_row(config: I2IConfig, changes: dict, seed: int, folder: Path) -> dict:
    """metrics.json of one run."""
    common = read_values(ForgetConfig, "bundled/digits_inpaint") | {
        "forget_images": FORGOTTEN, "retain_images": RETAINED, "other_images": THIRD, "forget_alpha": 0.25,
        "num_train_steps": config.num_train_steps, "checkpointing_steps": None,
    }  # fmt: skip
    own = family_defaults(read_model_index(common["model"])["_class_name"])
    options = layered(ForgetConfig, own, common, changes, {"seed": seed, "output_dir": str(folder)})
    named = {name: options.get(name) for name in ("forget_images", "retain_images", "other_images", "fisher_images")}
    options |= {name: f"{config.pictures}:{classes}" for name, classes in named.items() if classes}
    return run_forgetting(config_from_dict(ForgetConfig, options)).metrics


def run_study(config: I2IConfig) -> dict:
    """{row: {seed: {"before", "after", "seconds"}}} of all rows there are, in study.json and, as means, study.md."""
    folder = Path(config.output_dir)
    found = json.loads((folder / "study.json").read_text()) if (folder / "study.json").exists() else {}
    for name, changes in ROWS.items():
        for seed in config.seeds if config.only is None or config.only in name else ():
            metrics = run_row(config, changes, seed, folder / name.replace(" ", "_") / str(seed))
            kept = {side: metrics[side] for side in ("before", "after")} | {"seconds": metrics["seconds"]["train"]}
            found.setdefault(name, {})[str(seed)] = kept
            write_json(found, folder / "study.json")
            write_text(table(found), folder / "study.md")
    return found


def table(found: dict) -> str:
    """Means over seeds: masked error and accuracy under the first mask, and the error of a new decoder."""
    if not found:
        return ""

    def cells(side: str, runs: dict) -> list[str]:
        values = [run[side] for run in runs.values()]
        pairs = [
            tuple(sum(v[name][key] for v in values) / len(values) for key in ("masked_mse", "accuracy"))
            for name in GROUPS
            if all(name in v for v in values)
        ]
        decoder = sum(v["fresh_decoder"]["masked_mse"] for v in values) / len(values)
        return [*(f"{error:.3f} / {right:.3f}" for error, right in pairs), f"{decoder:.3f}"]

    first = next(iter(found.values()))
    rows = [("original", "", *cells("before", first))]
    rows += [(name, len(runs), *padded(cells("after", runs), runs)) for name, runs in found.items()]
    return markdown_table(("row", "seeds", *GROUPS, "new decoder, forget"), rows) + "\n"


def padded(cells: list[str], runs: dict) -> list[str]:
    """With a dash for pictures to retain where there were none."""
    return cells if all("retain" in run["after"] for run in runs.values()) else [cells[0], "–", *cells[1:]]
