"""What every part of the MNIST study works with: images, classifiers, base models, and runs that forget."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.labelled_images import LabelledImages, load_labelled_images
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.families import family_defaults
from sa_diffusers.families.conditional_vae import ConditionalVAEFamily
from sa_diffusers.io.artifacts import Marker
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.configuration import config_from_dict, identity_names, layered, option, read_back
from sa_diffusers.io.hub import explain_load_errors
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.base.labelled import ConditionalVAEConfig, train_conditional_vae
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from studies.classifiers import train_classifiers


@dataclass
class StudyConfig:
    """Everything `scripts/mnist_study.py` can be told."""

    output_dir: str = option("runs/mnist_study", "Folder of the study.")
    base_config: str = option("configs/mnist_cvae.yaml", "YAML of the base model; also names the data set.")
    classifier_config: str = option(
        "configs/mnist_classifier.yaml", "YAML of the classifiers, trained if none are given."
    )
    data_dir: str = option("ylecun/mnist", "Hub id or local folder of MNIST.")
    base_steps: int | None = option(None, "Steps of the base models; null: as the YAML says.")
    forget_steps: int | None = option(None, "Steps of each forgetting by default; null: as the family's defaults say.")
    faithful_steps: int = option(10000, "Steps of the forgetting with the authors' settings; theirs are 10,000.")
    encoder_steps: int = option(5000, "Steps where the encoder also forgets, to look at the latent space.")
    projection_steps: int = option(1000, "Steps of each run that compares gradient projection; the study's: 2,000.")
    classifier: list[str] = option([], "Folders of trained classifiers; none: five are trained first.")
    model: str | None = option(None, "Folder of a trained 8-D base pipeline; null: it is trained first.")
    only: str | None = option(None, "Parts to run, separated by commas; null: all of them.")
    num_images: int = option(1000, "Pictures of a class behind each probability.")
    num_seeds: int = option(5, "Seeds where several are compared.")
    num_threads: int = option(2, "CPU threads (`accelerate launch` alone sets 1).")
    seed: int = option(0, "Seed of every random number.")


@dataclass
class Study:
    """The study's inputs, made when first asked for and kept in its folder; parts only read them."""

    config: StudyConfig
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output_dir)

    def load_given(self) -> None:
        """Load the classifiers and the model that the configuration names, before anything is trained.

        Raises:
            ModelLoadError: one of them cannot be loaded.
        """
        if self.config.classifier:
            _ = self.classifiers
        if self.config.model:
            self.load(self.base())

    @cached_property
    def base_config(self) -> ConditionalVAEConfig:
        values = yaml.safe_load(Path(self.config.base_config).read_text())
        config = config_from_dict(ConditionalVAEConfig, values | {"data_dir": self.config.data_dir})
        if self.config.base_steps:
            config.num_train_steps = self.config.base_steps
        config.num_threads = self.config.num_threads
        return config

    @cached_property
    def train_images(self) -> LabelledImages:
        return load_labelled_images(self.base_config.dataset, self.config.data_dir, "train")

    @cached_property
    def test_images(self) -> LabelledImages:
        return load_labelled_images(self.base_config.dataset, self.config.data_dir, "test")

    @cached_property
    def classifiers(self) -> dict[str, ImageClassifier]:
        """By name; the first one is the judge where only one is shown. Trained on first use where none is given.

        Raises:
            ModelLoadError: one of them cannot be loaded.
        """
        config, trained = self.config, self.folder / "classifiers"
        names = [str(Path(path)) for path in config.classifier] or train_classifiers(
            config.classifier_config,
            config.data_dir,
            {seed: trained / f"seed_{seed}" for seed in range(config.num_seeds)},
        )
        return {name: load_classifier(name) for name in names}

    def base(self, latent_dim: int | None = None, without: int | None = None) -> Path:
        """Folder of a base pipeline, trained on first use.

        Args:
            latent_dim: None for that of the base config.
            without: a class whose images training never sees, for a control.
        """
        if latent_dim is None and without is None and self.config.model:
            return Path(self.config.model)
        name = f"latent_{latent_dim or self.base_config.latent_dim}" + (
            "" if without is None else f"_without_{without}"
        )
        folder = self.folder / "base" / name
        if not (folder / "pipeline").exists():
            data = self.train_images
            if without is not None:
                data = data.without([data.names[without]])
            config = replace(self.base_config, output_dir=str(folder), seed=self.config.seed)
            train_conditional_vae(data, replace(config, latent_dim=latent_dim or config.latent_dim))
        return folder / "pipeline"

    def load(self, path: Path) -> ConditionalVAEPipeline:
        """A pipeline in eval mode; loaded once. Raises ModelLoadError where it cannot be loaded."""
        return _load(path)

    def forget(self, name: str, concept: int | str, *, model: Path | None = None, **options: Any) -> tuple[Path, dict]:
        """A forgetting run of `scripts/forget.py` in `runs/<name>`: the folder of its pipeline, and its metrics.json.

        Args:
            concept: class to forget.
            model: pipeline to start from; None for `base()`.
            options: fields of ForgetConfig that differ from the family's defaults.

        Raises:
            StageMismatch: the folder holds a run with other options.
        """
        folder = self.folder / "runs" / name
        config = replace(self.settings(concept, model=model, **options), output_dir=str(folder))
        others = _differing(folder, config) if (folder / "metrics.json").exists() else {"unfinished"}
        if others:
            run_forgetting(replace(config, overwrite=others == {"classifier"}))  # another judgement of the same run
        return folder / "pipeline", json.loads((folder / "metrics.json").read_text())

    def settings(self, concept: int | str, *, model: Path | None = None, **options: Any) -> ForgetConfig:
        """Every option of a run of `forget` with the same arguments: the family's defaults, the study's, its own."""
        steps = {} if self.config.forget_steps is None else {"num_train_steps": self.config.forget_steps}
        values = {
            "eval_images_concept": self.config.num_images,
            "eval_images_class": max(1, self.config.num_images // 2),
            "seed": self.config.seed,
            "num_threads": self.config.num_threads,
            "surrogate": "noise",
            "classifier": list(self.classifiers),
        }
        values |= steps | {"concept": str(concept), "model": str(model or self.base())}
        layers = family_defaults("ConditionalVAEPipeline"), values, options
        return config_from_dict(ForgetConfig, layered(ForgetConfig, *layers)).resolved()

    def part(self, name: str, compute: "Callable[[Study, Path], dict]") -> dict:
        """What a part of the study found: computed, with its figures, into its folder, or read if that is done."""
        folder = self.folder / name
        identity = {k: v for k, v in vars(self.config).items() if k not in ("output_dir", "only", "num_threads")}
        marker = Marker(folder, name, {"config": identity})
        if not marker.done():
            found = compute(self, folder)
            write_json(found, folder / f"{name}.json")
            marker.finish(0.0)
        return json.loads((folder / f"{name}.json").read_text())


def _differing(folder: Path, config: ForgetConfig) -> set[str]:
    """Names of the options that change a result, and who judges it, that the run in a folder was told otherwise."""
    told = read_back(folder / "config.yaml")
    names = (*identity_names(type(config)), "classifier")
    return {name for name in names if told.get(name) != getattr(config, name)}


@cache
def _load(path: Path) -> ConditionalVAEPipeline:
    source = resolve(str(path))
    with explain_load_errors(source):
        pipeline = ConditionalVAEPipeline.from_pretrained(source)
    pipeline.vae.eval()
    return pipeline


def draw(pipeline: ConditionalVAEPipeline, label: int, count: int, seed: int) -> Tensor:
    """Images [N, C, H, W] in [0, 1] of a class; equal seeds give every pipeline the same latents."""
    seeds = [derive_seed(seed, "study", index) for index in range(count)]
    return ConditionalVAEFamily(pipeline).draw([Condition(label=label)] * count, seeds)


@torch.no_grad()
def encode_means(pipeline: ConditionalVAEPipeline, data: LabelledImages, indices: Sequence[int]) -> Tensor:
    """Encoder means [N, latent_dim] of images under their own labels."""
    parts = torch.as_tensor(list(indices)).split(1000)
    return torch.cat([pipeline.vae.encode(data.sample(part), data.labels[part])[0] for part in parts])


def read(classifier: ImageClassifier, images: Tensor) -> Tensor:
    """Class probabilities [N, classes] of images [N, C, H, W] in [0, 1]."""
    return classifier.probabilities((2 * images - 1).expand(-1, 3, -1, -1))["digit"]
