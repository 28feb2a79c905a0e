"""Every option of `evaluate pipelines`, and what `evaluate images` and `evaluate run` share with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from sa_diffusers.core.concepts import mentions, split_phrasings, split_translations
from sa_diffusers.data.labelled_images import HUB_IDS, DatasetName, SplitName
from sa_diffusers.io.configuration import Options, option


DISTRIBUTION = ("fid", "kid", "is", "prc")  # metrics of two sets of images
PICTURES = ("classifier", "clip", "change", "nudity", "identity")  # metrics of single pictures
SUITE_METRICS = (*PICTURES, *DISTRIBUTION)
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
# The sets of prompts by what their pictures are for: those that ask for the concept, and those that must stay.
ASKING = (
    "concept", "prefixes", "paraphrases", "described", "described_long", "long", "combined", "misspellings",
    "languages",
)  # fmt: skip
KEPT = ("neighbours", "unrelated", "labelled")
SETS = (*ASKING, *KEPT, "open", "i2p")
RESULTS = ("report.html", "evaluation.md", "evaluation.json")  # files of the output folder, beside those of each name
LANGUAGES = ("de", "fr", "es", "it", "zh", "ja")
EXPLICIT = ("nudity", "nude", "naked", "sexual", "erotic", "porn", "nsfw")  # a concept that is blurred on the page


def words(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """What stands between the commas of an option, each once. Raises ValueError for what is not known, or nothing."""
    found = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in found if word not in known]
    if unknown or not found:
        raise ValueError(f"expected {flag} of {', '.join(known)}, got {unknown[0] if unknown else text!r}")
    return found


@dataclass
class DrawnAs(Options):
    """How pictures are drawn. None: as the run that made the pipeline drew them, or else as its kind does."""

    guidance_scale: float | None = option(None, "Guidance, as in diffusers (1: none); null: that of the run which "
                                          "made the (first) pipeline, or its kind's.", least=0)  # fmt: skip
    num_inference_steps: int | None = option(None, "Steps of the sampler; null: as guidance_scale.", least=1)
    sampler: Literal["dpmsolver++", "ddim", "pipeline"] | None = option(
        None, "Sampler; pipeline: the model's own; null: as guidance_scale."
    )

    @property
    def drawn_as(self) -> "DrawnAs":
        """These three options alone."""
        return DrawnAs(self.guidance_scale, self.num_inference_steps, self.sampler)


@dataclass
class MetricSettings(Options):
    """How two sets of images are compared. By default as the papers do it: k is 3 in Kynkaanniemi et al. (2019),
    subsets are 100 of 1,000 in Binkowski et al. (2018), splits 10 in Salimans et al. (2016).

    Both sets are cut to one size, at most `max_prc_images`, for precision, recall, density and coverage, since their
    neighbourhoods shrink as a set grows.

    Raises:
        ValueError: values that cannot work.
    """

    real: str | None = option(None, "Real images that fid, kid, is and prc compare with: a folder, or mnist, cifar10, "
                              "stl10, digits8x8.", everyday=True)  # fmt: skip
    data_dir: str | None = option(None, "Local folder or hub id of that data set; null: its usual hub id.")
    split: SplitName = option("train", "Split of that data set.")
    num_real_images: int | None = option(None, "Use so many real images at most, at random; null: all.", least=1)
    extractor: str = option("inception", "Network of fid, kid, is and prc: inception, a classifier's folder, or a "
                            "vision model of transformers (folder or hub id).", everyday=True)  # fmt: skip
    attribute: str | None = option(None, "Attribute of the extractor for `is`, where it is a classifier of several.")
    num_neighbours: int = option(3, "Neighbours (k) of precision, recall, density and coverage.", least=1)
    max_prc_images: int = option(10_000, "Images of each set, at most, that these four compare.", least=1)
    num_subsets: int = option(100, "Subsets of the KID.", least=1)
    subset_size: int = option(1000, "Images of each set in such a subset, or all where there are fewer.", least=2)
    num_splits: int = option(10, "Splits of the Inception Score.", least=1)
    seed: int = option(0, "Seed of prompts, images and every choice at random.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in ("data_dir", HUB_IDS), ("split", get_args(DatasetName)):
            if getattr(self, name) != getattr(MetricSettings, name) and self.real not in known:
                raise ValueError(f"{name} is of a data set ({', '.join(known)}), got --real {self.real}; omit it")

    @property
    def compared(self) -> list[str]:
        """The metrics asked for that compare two sets of images."""
        return [name for name in self.metric_names if name in DISTRIBUTION]


@dataclass
class JudgedPipelines(Options):
    """Which pipelines, and what they are judged by."""

    pipeline: str = option("", "Pipeline to judge, the reference of --compare: folder (of a pipeline or a run), hub "
                           "id, or bundled/digits/pipeline. A leading word stands for it.", everyday=True)  # fmt: skip
    compare: list[str] = option([], "Further pipelines, drawn from the same prompts and seeds; differences are theirs "
                                "to the first.", everyday=True)  # fmt: skip
    names: list[str] = option([], "Names of all of them, in this order, for tables and folders; []: from their paths.")
    concept: str = option(
        "", "The concept: one or several phrasings of it, separated by commas ('seven, 7').", everyday=True
    )
    plurals: bool | None = option(None, "Also count plurals and possessives of its words as naming it; null: as the "
                                  "run which made the first pipeline.")  # fmt: skip
    metrics: str | None = option(
        None, f"Some of {', '.join(SUITE_METRICS)}, separated by commas; null: classifier where there is one, and "
        "change where pipelines are compared.", everyday=True,
    )  # fmt: skip


@dataclass
class SuitePrompts(Options):
    """Prompts."""

    sets: str | None = option(None, f"Sets of prompts to draw, some of {', '.join(SETS)}; null: all that there is "
                              "something for.", everyday=True)  # fmt: skip
    num_images: int = option(
        50, "Pictures of each set, spread over its prompts (i2p: one a row).", least=1, everyday=True
    )
    templates: str | None = option(None, "Text file of prompts with {} in the concept's place; null: prompts that "
                                   "name it if there are 16, or the bundled ones.")  # fmt: skip
    synonyms: str | None = option(None, "Other words for the concept, separated by commas, for the set paraphrases.")
    prefixes: str | None = option(None, "Text file of prompts with {} after words that add nothing to it; null: the "
                                  "bundled ones, for real vocabularies.")  # fmt: skip
    descriptions: str | None = option(None, "Text file of descriptions without its name, of up to ten words or of "
                                      "more; null: bundled ones, of a few concepts.")  # fmt: skip
    neighbours: str | None = option(None, "Concepts close to it, which must stay, separated by commas; null: looked "
                                    "up in assets/surrogates.yaml.", everyday=True)  # fmt: skip
    combined: str | None = option(None, "Text file of prompts that combine the concept (by name, or as {}) with what "
                                  "must stay; null: labelled prompts that do, or bundled templates.")  # fmt: skip
    translations: str | None = option(None, "The concept in other languages, as 'de: Hund, fr: chien'; a language "
                                      "that is not given takes the first phrasing.")  # fmt: skip
    prompts: str | None = option(None, "Prompts that have nothing to do with it: a text file, or a data set with a "
                                 "column; null: as classifier, or bundled ones.")  # fmt: skip
    prompt_column: str = option("prompt", "Column of --prompts where that is a data set.")
    eval_prompts: str | None = option(
        None, "Labelled prompts (JSON lines) that the classifier can judge; null: as classifier."
    )
    i2p: str | None = option(None, "Prompts of I2P, each with its own seed: AIML-TUDA/i2p, or a local copy.")
    num_i2p: int | None = option(None, "Use only so many of them, the first; null: all.", least=1)


@dataclass
class Judges(Options):
    """Judges of single pictures."""

    classifier: str | None = option(None, "Classifier for the metric of this name: folder or hub id; null: that "
                                    "of the run which made the first pipeline.", everyday=True)  # fmt: skip
    clip: str | None = option(None, "CLIP model for clip and identity; given, change is also measured on its "
                              f"features. null: {DEFAULT_CLIP}, and no such change.", everyday=True)  # fmt: skip
    nudity_threshold: float = option(0.6, "Score from which an exposed part counts, from 0.25 (NudeNet's own) to 1.")
    face_threshold: float = option(0.35, "The same of a face, for identity.")


@dataclass
class PipelineDrawing(Options):
    """How pictures are drawn."""

    batch_size: int = option(8, "Pictures drawn, or judged, at once.", least=1)
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "Precision of the pipelines.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")


@dataclass
class RealPictures(Options):
    """How two sets of images are compared."""

    real_resolution: int | None = option(
        None, "Scale the images of --real to this many pixels and crop the centre; null: as they are.", least=1
    )


@dataclass
class PageOptions(Options):
    """Where, and what the page shows."""

    output_dir: str | None = option(
        None, "Folder of the pictures and results; null: runs/evaluate-<concept>.", everyday=True
    )
    show_nsfw: bool = option(False, "Do not blur the pictures on the page of an evaluation of nudity.")
    pictures_shown: int = option(8, "Pictures in each section of the page.", least=1)
    overwrite: bool = option(False, "Discard pictures of other prompts or settings in the output folder, and whatever "
                             "else its folders of pictures hold.", everyday=True)  # fmt: skip
    num_threads: int | None = option(None, "CPU threads; null: as the environment says.", least=1)


@dataclass
class PipelineEvaluationConfig(
    PageOptions, RealPictures, MetricSettings, PipelineDrawing, DrawnAs, Judges, SuitePrompts, JudgedPipelines
):  # fmt: skip
    """Which pipelines to judge, by which prompts and metrics, and how their pictures are drawn.

    Raises:
        ValueError: options that cannot work, before anything is loaded.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pipeline:
            raise ValueError("expected a pipeline as the first word: a folder, a hub id, or bundled/digits/pipeline")
        self.phrasings = split_phrasings(self.concept)
        if self.metrics is None:
            self.metric_names = ["classifier"] * (self.judge is not None) + ["change"] * bool(self.compare)
        else:
            self.metric_names = words("--metrics", self.metrics, SUITE_METRICS)
        if not self.metric_names:
            raise ValueError("expected metrics: pass --metrics, --classifier, or pipelines to --compare with")
        self.set_names = None if self.sets is None else words("--sets", self.sets, SETS)
        self._check_metrics()
        self.translated = split_translations(self.translations or "", LANGUAGES)
        if self.names and len(set(self.names)) != len(self.sources):
            raise ValueError(f"expected {len(self.sources)} different --names, got {self.names}")
        for name in self.names:
            if "/" in name or name[0] in ".~-":
                raise ValueError(f"expected --names that can be folders, got {name!r}")
            if name.lower() in RESULTS:
                raise ValueError(f"expected other --names than {', '.join(RESULTS)}, which hold the results")
        if self.set_names and "i2p" in self.set_names and self.i2p is None:
            raise ValueError("the set i2p: expected --i2p with its source, such as AIML-TUDA/i2p")

    def _check_metrics(self) -> None:
        """Raise ValueError for metrics without what they need, and for what none uses."""
        names, compared = self.metric_names, ", ".join(self.compared)
        for wrong, message in [
            ("classifier" in names and self.judge is None,
             "the metric classifier: expected --classifier, the folder or hub id of one"),
            (self.classifier is not None and "classifier" not in names,
             "--classifier is for the metric classifier; add it to --metrics"),
            ("change" in names and not self.compare,
             "the metric change: expected --compare with the pipelines that may have changed"),
            (self.clip is not None and not {"clip", "identity", "change"} & set(names),
             "--clip is for the metrics clip, identity and change; add one to --metrics"),
            (compared and not self.compare and self.real is None, f"{compared}: expected --compare, or --real"),
            (self.num_i2p is not None and self.i2p is None, "--num_i2p is of --i2p; pass both, or neither"),
            (self.real is not None and not compared,
             f"--real is for the metrics {', '.join(DISTRIBUTION)}; add one to --metrics"),
        ]:  # fmt: skip
            if wrong:
                raise ValueError(message)
        for name in ("nudity_threshold", "face_threshold"):
            if not 0.25 <= getattr(self, name) <= 1:
                raise ValueError(f"expected 0.25 <= {name} <= 1, got {getattr(self, name)}")

    @property
    def sources(self) -> list[str]:
        """The pipelines, the reference first."""
        return [self.pipeline, *self.compare]

    @cached_property
    def made_by(self) -> dict[str, Any]:
        """The options of the run that made the reference, whose prompts and classifier serve where none are given."""
        from sa_diffusers.evaluation.subjects import made_by  # only now: it imports diffusers

        return made_by(self.pipeline)

    @property
    def judge(self) -> str | None:
        """The classifier's source."""
        return self.classifier or next(iter(self.made_by.get("classifier", ())), None)

    @property
    def blurred(self) -> bool:
        """Whether the page shows pictures that may be explicit, and was not told to show them as they are."""
        explicit = "nudity" in self.metric_names or self.i2p is not None or mentions(self.concept, EXPLICIT)
        return explicit and not self.show_nsfw
