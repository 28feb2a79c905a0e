"""Forgetting in a model that completes digits, its surrogates and rivals: the runs and their table."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sa_diffusers.data.picture_groups import read_group
from sa_diffusers.evaluation.completion import examine_completions
from sa_diffusers.evaluation.judging import ClassifierJudge
from sa_diffusers.families import Family, family_class, get_family
from sa_diffusers.io.atomic_files import write_json, write_text
from sa_diffusers.io.configuration import Options, config_from_dict, layered, option, read_values
from sa_diffusers.io.loading import load_pipeline, read_model_index
from sa_diffusers.io.processes import say
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from studies.i2i.figures import save_figures
from studies.i2i.probes import HOLE, Bench, conspicuousness, groups_filled, probe, unmeasured
from studies.i2i.references import filled_without_a_model, references
from studies.i2i.rows import FISHER_OF, FORGOTTEN, KINDS, ONCE, PROBED, RETAINED, ROWS, THIRD, rows_of
from studies.i2i.sections import table


HOLES = ("black hole", "noise hole")
Found = dict[str, dict[str, dict[str, Any]]]  # {row: {seed: what was measured}}


@dataclass
class I2IConfig(Options):
    """Everything `scripts/i2i_study.py` can be told."""

    model: str = option(
        "bundled/digits_inpaint/pipeline",
        "Pipeline that is to forget: a masked autoencoder, one of tokens, of pixels.",
    )
    pictures: str = option("bundled/digits_inpaint", "Data set of digits, as of scripts/compose_digit_pictures.py.")
    output_dir: str = option("runs/i2i_study", "Folder of the runs, study.json and study.md.")
    only: str | None = option(None, "Rows to run that contain this text; null: all.")
    seeds: list[int] = option([0], "Seeds of each row.")
    num_train_steps: int = option(150, "Optimiser steps of rows that do not say.", above=0)
    retrained: str | None = option(None, "The model trained without what is forgotten, to compare with; null: none.")
    eval_images_class: int = option(100, "Test pictures of each class to judge by, at most.", above=0)


class Study:
    """The runs and what is measured of them, in <output_dir>/study.json; what stands there is not run again."""

    def __init__(self, config: I2IConfig):
        self.config, self.folder = config, Path(config.output_dir)
        if config.retrained:
            read_model_index(config.retrained)  # or refused, before hours of runs
        self.family_class = family_class(read_model_index(config.model)["_class_name"])
        if self.family_class is None or self.family_class.name not in KINDS:
            found = self.family_class.name if self.family_class else "none"
            raise ValueError(f"expected a model of one of {', '.join(KINDS)} in {config.model}, got {found}")
        settings = {name: getattr(config, name) for name in ("pictures", "num_train_steps", "eval_images_class")}
        if config.model != I2IConfig.model:  # as folders of the bundled one have always said
            settings["model"] = config.model
        path = self.folder / "settings.json"
        if path.exists() and (there := json.loads(path.read_text(encoding="utf-8"))) != settings:
            raise ValueError(f"{self.folder} was made with {there}, got {settings}; pass another --output_dir")
        write_json(settings, path)
        path = self.folder / "study.json"
        self.found: Found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.common = read_values(ForgetConfig, "bundled/digits_inpaint") | {
            "model": config.model, "forget_alpha": 0.25,
            "forget_images": FORGOTTEN, "retain_images": RETAINED, "other_images": THIRD,
            "num_train_steps": config.num_train_steps, "checkpointing_steps": None, "eval_masks": [HOLE],
            "eval_images_class": config.eval_images_class,
        }  # fmt: skip

    @cached_property
    def bench(self) -> Bench:
        count, base = (None, self.config.eval_images_class), self.family(self.config.model)
        groups = {
            name: read_group(f"{self.config.pictures}:{classes}", name, base.resolution, count)
            for name, classes in (("forget", FORGOTTEN), ("retain", RETAINED), ("other", THIRD))
        }
        judge = ClassifierJudge.load(self.common["classifier"][0], [FORGOTTEN[0]])
        retrained = self.config.retrained and self.family(self.config.retrained)
        return Bench(groups, judge, base, retrained or None)

    @staticmethod
    def family(source: str | Path) -> Family:
        return get_family(load_pipeline(str(source), None, None, "float32"))

    def run_folder(self, row: str, seed: int) -> Path:
        return self.folder / row.replace(" ", "_") / str(seed)

    def run_row(self, row: str, seed: int) -> dict[str, Any]:
        """What metrics.json of a run says."""
        own, changes = self.family_class.defaults, ROWS[row]
        if "fisher" in changes:
            self.want(FISHER_OF, seed)
            changes = changes | {"fisher": str(self.run_folder(FISHER_OF, seed) / "fisher.safetensors")}
        place = {"seed": seed, "output_dir": str(self.run_folder(row, seed))}
        options = layered(ForgetConfig, own, self.common, changes, place)
        for name in ("forget_images", "retain_images", "other_images", "fisher_images"):
            if options.get(name):
                options[name] = f"{self.config.pictures}:{options[name]}"
        known = self.folder / f"before_{seed}.safetensors"  # the same of all runs on the same pictures
        if shared := not changes.keys() & {"retain_images", "other_images", "fisher_images", "images_class"}:
            options["before"] = str(known) if known.exists() else None
        metrics = run_forgetting(config_from_dict(ForgetConfig, options)).metrics
        if shared and not known.exists():
            shutil.copyfile(self.run_folder(row, seed) / "evaluation" / "before.safetensors", known)
        sides = {side: dict(metrics[side]) for side in ("before", "after")}
        if "retain_images" in changes and not changes["retain_images"]:
            for values in sides.values():  # see BARE
                values["retain"] = values.pop("third")
        return sides | {"seconds": metrics["seconds"]["train"]}

    def want(self, row: str, seed: int) -> None:
        """Run a row unless it stands in study.json, and measure its model where that is to be."""
        entry = self.found.get(row, {}).get(str(seed))
        if entry is None:
            entry = {"family": self.family_class.name, **self.run_row(row, seed)}
            self.found.setdefault(row, {})[str(seed)] = entry
            self.keep()
        if row in PROBED:
            self.measure(row, seed, lambda: self.family(self.run_folder(row, seed) / "pipeline"))

    def measure(self, row: str, seed: int, load: Callable[[], Family]) -> None:
        """What is missing of the measures of a row's model."""
        entry, rival = self.found[row][str(seed)], self.bench.retrained
        if "psnr" not in entry["after"]["forget"]:
            self.add_measures(entry["after"], groups_filled(self.bench, load(), seed))
        probes = entry.get("probes", {})
        if missing := unmeasured(self.bench.base, probes):
            say(f"measures of {row}, seed {seed}: {', '.join(missing)}")
            entry["probes"] = probe(self.bench, load(), seed, probes)
            self.keep()
        if rival is not None and row != "retrained" and "conspicuousness" not in entry["probes"]:
            entry["probes"]["conspicuousness"] = conspicuousness(self.bench, load(), seed)
            self.keep()

    def add_measures(self, side: dict[str, dict], found: dict[str, dict]) -> None:
        """What a side of older runs lacks; what it says stays."""
        for name, values in found.items():
            side[name] = values | side.get(name, {})
        self.keep()

    def measure_references(self, seed: int) -> None:
        """The model before forgetting, the retrained one, and what no model fills in."""
        bench, kind = self.bench, {"family": self.family_class.name}
        for row, family in (("original", bench.base), ("retrained", bench.retrained)):
            if family is None:
                continue
            if str(seed) not in self.found.setdefault(row, {}):
                values = examine_completions(family, bench.groups, {"": bench.judge}, [HOLE], seed).values
                self.found[row][str(seed)] = kind | {"after": values}
            self.measure(row, seed, lambda family=family: family)
        holes = [self.found.setdefault(row, {}).setdefault(str(seed), kind | {"after": {}}) for row in HOLES]
        if any("psnr" not in entry["after"].get("forget", {}) for entry in holes):
            for entry, values in zip(holes, filled_without_a_model(bench, seed).values(), strict=True):
                self.add_measures(entry["after"], values)
        probes = holes[-1].get("probes", {})
        if (measured := references(bench, seed, probes)) != probes:
            holes[-1]["probes"] = measured
            self.keep()

    def keep(self) -> None:
        write_json(self.found, self.folder / "study.json")
        write_text(table(self.found), self.folder / "study.md")


def run_study(config: I2IConfig) -> Found:
    """All rows there are, {row: {seed: {"before", "after", "seconds", "probes"}}}: study.json, study.md, figures."""
    study = Study(config)
    wanted = [row for row in rows_of(study.family_class.name) if config.only is None or config.only in row]
    for seed in config.seeds:
        for row in wanted:
            if row not in ONCE or seed == config.seeds[0]:
                study.want(row, seed)
        if config.only is None:
            study.measure_references(seed)
        if config.only is None and seed == config.seeds[0]:
            models = {row: study.run_folder(row, seed) / "pipeline" for row in PROBED if row in wanted}
            families = {"original": study.bench.base} | {row: study.family(folder) for row, folder in models.items()}
            if study.bench.retrained is not None:
                families["retrained"] = study.bench.retrained
            save_figures(study.bench, study.found, families, study.folder)
    return study.found
