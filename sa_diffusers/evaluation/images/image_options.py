"""Every option of `scripts/evaluate.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sa_diffusers.data.labelled_images import SplitName
from sa_diffusers.io.configuration import option


METRICS = ("fid", "kid", "is", "prc", "classifier")


def words(text: str) -> list[str]:
    """What stands between the commas of an option, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def check_at_least_one(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError for a field below 1; None is no number and is left."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")


@dataclass
class MetricSettings:
    """How the metrics of two sets of images are taken, by default as the papers take them: k is 3 in Kynkaanniemi et
    al. (2019), subsets are 100 of 1,000 in Binkowski et al. (2018), splits 10 in Salimans et al. (2016).

    Both sets are cut to one size, at most `max_prc_images`, for precision, recall, density and coverage, since their
    neighbourhoods shrink as a set grows.

    Raises:
        ValueError: values that cannot work.
    """

    num_neighbours: int = option(3, "Neighbours (k) of precision, recall, density and coverage.")
    max_prc_images: int = option(10_000, "Images of each set, at most, that these four compare.")
    num_subsets: int = option(100, "Subsets of the KID.")
    subset_size: int = option(1000, "Images of each set in such a subset, or all where there are fewer.")
    num_splits: int = option(10, "Splits of the Inception Score.")
    seed: int = option(0, "Seed of images and of every choice at random.")

    def __post_init__(self) -> None:
        check_at_least_one(self, ("num_neighbours", "max_prc_images", "num_subsets", "num_splits"))
        if self.subset_size < 2:
            raise ValueError(f"expected subset_size >= 2, got {self.subset_size}")


@dataclass
class ComparedImages:
    """Which images to compare with which, and by what."""

    generated: str | None = option(None, "Folder of generated images; or pass --run.")
    run: str | None = option(None, "Folder of a run, with `pipeline/` inside, whose images are drawn.")
    real: str | None = option(None, "Real images: a folder, or mnist, cifar10, stl10, digits8x8.")
    data_dir: str | None = option(None, "Local folder or hub id of that data set; null: its usual hub id.")
    split: SplitName = option("train", "Split of that data set.")
    resolution: int | None = option(None, "Scale the images of folders to this many pixels and crop the centre.")
    num_real_images: int | None = option(None, "Use at most so many real images, chosen at random; null: all.")
    metrics: str = option("fid,prc", "Some of fid, kid, is, prc and classifier (for --run), separated by commas.")
    extractor: str = option("inception", "Network for all but `classifier`: inception, a classifier's folder, or a "
                            "vision model of transformers (folder or hub id).")  # fmt: skip
    attribute: str | None = option(None, "Attribute of the extractor for `is`, where it is a classifier of several.")
    classifier: str | None = option(None, "Classifier for the metric of this name: folder or hub id.")
    concept: str | None = option(None, "Class to leave out of the comparison; null: what --run forgot, if anything.")
    prompts: str | None = option(None, "Prompts for a text-to-image run: a text file, one image a line.")
    num_images_per_class: int = option(200, "Images drawn of each class of a class-conditional run.")
    settings_of: str | None = option(None, "Folder of another run whose guidance, steps and sampler are taken where "
                                     "they are not given, so that the numbers of both compare: of a base run, the "
                                     "run that forgot on it. null: the run's own.")  # fmt: skip
    guidance_scale: float | None = option(None, "Guidance, as in diffusers (1: none); null: the run's own.")
    num_inference_steps: int | None = option(None, "Steps of the sampler; null: the run's own.")
    sampler: Literal["dpmsolver++", "ddim", "pipeline"] | None = option(None, "Sampler; null: the run's own.")
    sample_batch_size: int | None = option(None, "Images drawn at once; null: the run's own. Changes no image.")
    feature_batch_size: int = option(64, "Images whose features are computed at once.")


@dataclass
class EvaluateConfig(MetricSettings, ComparedImages):
    """What to compare with what, and how.

    Raises:
        ValueError: options that do not go together, before anything is loaded.
    """

    save_images: str | None = option(None, "New folder for the drawn images; null: they are not kept.")
    output: str | None = option(None, "JSON file of the results; null: <run>/evaluate.json, or none for two folders.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.generated is None) == (self.run is None):
            raise ValueError("expected either --generated, a folder of images, or --run, the folder of a run")
        unknown = [name for name in self.names if name not in METRICS]
        if unknown or not self.names:
            raise ValueError(f"expected --metrics of {', '.join(METRICS)}, got {self.metrics!r}")
        if self.real is None and self.compared:
            raise ValueError(f"{', '.join(self.compared)}: expected --real, a folder of images or a data set")
        if (self.classifier is not None) != ("classifier" in self.names):
            raise ValueError("expected both the metric classifier and --classifier, or neither")
        if self.run is None and (self.classifier or self.prompts or self.save_images or self.settings_of):
            raise ValueError(
                "classifier, prompts, save_images and settings_of are for --run; leave them away for two folders"
            )
        check_at_least_one(
            self, ("num_images_per_class", "feature_batch_size", "sample_batch_size", "num_inference_steps",
                   "resolution", "num_real_images"),
        )  # fmt: skip

    @property
    def names(self) -> list[str]:
        return words(self.metrics)

    @property
    def compared(self) -> list[str]:
        """The metrics that compare generated images with real ones."""
        return [name for name in self.names if name != "classifier"]
