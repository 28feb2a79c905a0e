"""Every option of `scripts/evaluate.py`."""

from dataclasses import dataclass
from typing import Literal

from sa_diffusers.data.labelled_images import SplitName
from sa_diffusers.io.configuration import Options, option


METRICS = ("fid", "kid", "is", "prc", "classifier")


def words(text: str) -> list[str]:
    """What stands between the commas of an option, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@dataclass
class MetricSettings(Options):
    """How the metrics of two sets of images are taken, by default as the papers take them: k is 3 in Kynkaanniemi et
    al. (2019), subsets are 100 of 1,000 in Binkowski et al. (2018), splits 10 in Salimans et al. (2016).

    Both sets are cut to one size, at most `max_prc_images`, for precision, recall, density and coverage, since their
    neighbourhoods shrink as a set grows.

    Raises:
        ValueError: values that cannot work.
    """

    num_neighbours: int = option(3, "Neighbours (k) of precision, recall, density and coverage.", least=1)
    max_prc_images: int = option(10_000, "Images of each set, at most, that these four compare.", least=1)
    num_subsets: int = option(100, "Subsets of the KID.", least=1)
    subset_size: int = option(1000, "Images of each set in such a subset, or all where there are fewer.", least=2)
    num_splits: int = option(10, "Splits of the Inception Score.", least=1)
    seed: int = option(0, "Seed of images and of every choice at random.")


@dataclass
class ComparedImages(Options):
    """Which images to compare with which, and by what."""

    generated: str | None = option(None, "Folder of generated images; or pass --run.")
    run: str | None = option(None, "Folder of a run, with `pipeline/` inside, whose images are drawn.")
    real: str | None = option(None, "Real images: a folder, or mnist, cifar10, stl10, digits8x8.")
    data_dir: str | None = option(None, "Local folder or hub id of that data set; null: its usual hub id.")
    split: SplitName = option("train", "Split of that data set.")
    resolution: int | None = option(
        None, "Scale the images of folders to this many pixels and crop the centre.", least=1
    )
    num_real_images: int | None = option(
        None, "Use at most so many real images, chosen at random; null: all.", least=1
    )
    metrics: str = option("fid,prc", "Some of fid, kid, is, prc and classifier (for --run), separated by commas.")
    extractor: str = option("inception", "Network for all but `classifier`: inception, a classifier's folder, or a "
                            "vision model of transformers (folder or hub id).")  # fmt: skip
    attribute: str | None = option(None, "Attribute of the extractor for `is`, where it is a classifier of several.")
    classifier: str | None = option(None, "Classifier for the metric of this name: folder or hub id.")
    concept: str | None = option(None, "Class to leave out of the comparison; null: what --run forgot, if anything.")
    prompts: str | None = option(None, "Prompts for a text-to-image run: a text file, one image a line.")
    num_images_per_class: int = option(200, "Images drawn of each class of a class-conditional run.", least=1)
    settings_of: str | None = option(None, "Folder of another run whose guidance, steps and sampler are taken where "
                                     "they are not given, so that the numbers of both compare: of a base run, the "
                                     "run that forgot on it. null: the run's own.")  # fmt: skip
    guidance_scale: float | None = option(None, "Guidance, as in diffusers (1: none); null: the run's own.")
    num_inference_steps: int | None = option(None, "Steps of the sampler; null: the run's own.", least=1)
    sampler: Literal["dpmsolver++", "ddim", "pipeline"] | None = option(None, "Sampler; null: the run's own.")
    sample_batch_size: int | None = option(
        None, "Images drawn at once; null: the run's own. Changes no image.", least=1
    )
    feature_batch_size: int = option(64, "Images whose features are computed at once.", least=1)


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

    @property
    def names(self) -> list[str]:
        return words(self.metrics)

    @property
    def compared(self) -> list[str]:
        """The metrics that compare generated images with real ones."""
        return [name for name in self.names if name != "classifier"]
