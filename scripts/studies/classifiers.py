"""The classifiers that judge a study, trained where none are given."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.runs.base.classifier import ClassifierConfig, train_and_save_classifier


def train_classifiers(config: str | Path, data_dir: str | None, folders: Mapping[int, Path]) -> list[str]:
    """Train what is not there yet; returns the classifiers' folders.

    Args:
        config: YAML of all of them.
        data_dir: hub id or local folder of the data set; None: as the YAML says.
        folders: of each training, by its seed.
    """
    values = yaml.safe_load(Path(config).read_text())
    for seed, folder in folders.items():
        if not (folder / "classifier").exists():
            options = values | {"data_dir": data_dir, "seed": seed, "output_dir": str(folder)}
            train_and_save_classifier(config_from_dict(ClassifierConfig, options))
    return [str(folder / "classifier") for folder in folders.values()]
