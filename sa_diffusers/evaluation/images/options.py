"""Every option of `evaluate images` and `evaluate run`."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sa_diffusers.data.labelled_images import DatasetName
from sa_diffusers.evaluation.options import DISTRIBUTION, DrawnAs, MetricSettings, words
from sa_diffusers.io.configuration import option


@dataclass
class ComparedImages(MetricSettings):
    """Which generated images to compare with real ones, and by what.

    Raises:
        ValueError: options that do not go together, before anything is loaded.
    """

    known = DISTRIBUTION

    metrics: str = option(
        "fid,prc", "Some of fid, kid, is, prc and (of a run) classifier, separated by commas.", everyday=True
    )
    resolution: int | None = option(
        None, "Scale images of folders to so many pixels and crop the centre.", least=1, everyday=True
    )
    concept: str | None = option(None, "Class to leave out of the comparison; null: what the run forgot, if anything.")
    feature_batch_size: int = option(64, "Images whose features are computed at once.", least=1)
    output: str | None = option(None, "JSON file of the results; null: none, or <run>/evaluate.json.", everyday=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.metric_names = words("--metrics", self.metrics, self.known)
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"expected --output with the name of a file to be, got the folder {self.output}")
        if self.real is None and self.compared:
            raise ValueError(f"{', '.join(self.compared)}: expected --real, a folder of images or a data set")


@dataclass
class FoldersConfig(ComparedImages):
    """The images that are judged."""

    generated: str = option("", "Folder of generated images.", everyday=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.generated:
            raise ValueError("expected --generated, a folder of images, as the second word")
        if self.concept is not None and self.real not in get_args(DatasetName):
            raise ValueError(f"--concept leaves a class of a data set out, and --real {self.real} is none; omit it")


@dataclass
class RunConfig(DrawnAs, ComparedImages):
    """The run that is judged."""

    known = (*DISTRIBUTION, "classifier")

    run: str = option("", "Folder of a run, with `pipeline/` inside, whose images are drawn.", everyday=True)
    classifier: str | None = option(None, "Classifier for the metric of this name: folder or hub id.", everyday=True)
    prompts: str | None = option(None, "Prompts for a text-to-image run: a text file, one image a line.")
    num_images_per_class: int = option(
        200, "Images drawn of each class of a class-conditional run.", least=1, everyday=True
    )
    settings_of: str | None = option(None, "Folder of another run whose guidance, steps and sampler are taken where "
                                     "they are not given, so that the numbers of both compare: of a base run, the "
                                     "run that forgot on it. null: the run's own.")  # fmt: skip
    sample_batch_size: int | None = option(
        None, "Images drawn at once; null: as many as fit. Changes no image.", least=1
    )
    save_images: str | None = option(None, "New folder for the drawn images; null: off.", everyday=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise ValueError("expected --run, the folder of a run, as the first word")
        if (self.classifier is not None) != ("classifier" in self.metric_names):
            raise ValueError("expected both the metric classifier and --classifier, or neither")
