"""Every option of `scripts/evaluate.py <pipeline> --concept ...`."""

from dataclasses import dataclass
from typing import Literal

from sa_diffusers.core.concepts import mentions, split_phrasings
from sa_diffusers.evaluation.images.options import words
from sa_diffusers.io.configuration import Options, option


METRICS = ("classifier", "clip", "change", "nudity", "identity", "fid", "kid", "prc")
DISTRIBUTION = ("fid", "kid", "prc")  # metrics of two sets of images
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
# The sets of prompts by what their pictures are for: those that ask for the concept, and those that must stay.
ASKING = ("concept", "paraphrases", "long", "combined", "misspellings", "languages")
KEPT = ("neighbours", "unrelated", "labelled")
SETS = (*ASKING, *KEPT, "open", "i2p")
RESULTS = ("report.html", "evaluation.md", "evaluation.json")  # files of the output folder, beside those of each name
LANGUAGES = ("de", "fr", "es", "it", "zh", "ja")
EXPLICIT = ("nudity", "nude", "naked", "sexual", "erotic", "porn", "nsfw")  # a concept that is blurred on the page


@dataclass
class PipelineEvaluationConfig(Options):
    """Which pipelines to judge, by which prompts and metrics, and how their pictures are drawn.

    Raises:
        ValueError: options that cannot work, before anything is loaded.
    """

    # What
    pipeline: str = option("", "Pipeline to judge, the reference of --compare: folder (of a pipeline or a run), hub "
                           "id, or bundled/digits/pipeline. The first word of the command needs no name.")  # fmt: skip
    compare: list[str] = option([], "Further pipelines, drawn from the same prompts and seeds; differences are theirs "
                                "to the first.")  # fmt: skip
    names: list[str] = option([], "Names of all of them, in this order, for tables and folders; []: from their paths.")
    concept: str = option("", "The concept: one or several phrasings of it, separated by commas ('seven, 7').")
    metrics: str | None = option(None, f"Some of {', '.join(METRICS)}, separated by commas; null: classifier where "
                                 "there is one, and change where pipelines are compared.")  # fmt: skip
    output_dir: str | None = option(None, "Folder of the pictures and results; null: runs/evaluate-<concept>.")

    # Prompts
    sets: str | None = option(None, f"Sets of prompts to draw, some of {', '.join(SETS)}; null: all that there is "
                              "something for.")  # fmt: skip
    num_images: int = option(50, "Pictures of each set, spread over its prompts (i2p: one a row).", least=1)
    templates: str | None = option(None, "Text file of prompts with {} in the concept's place; null: prompts that "
                                   "name it if there are 16, or the bundled ones.")  # fmt: skip
    synonyms: str | None = option(None, "Other words for the concept, separated by commas, for the set paraphrases.")
    neighbours: str | None = option(None, "Concepts close to it, which must stay, separated by commas; null: looked "
                                    "up in assets/surrogates.yaml.")  # fmt: skip
    combined: str | None = option(None, "Text file of prompts that combine the concept (by name, or as {}) with what "
                                  "must stay; null: labelled prompts that do.")  # fmt: skip
    translations: str | None = option(None, "The concept in other languages, as 'de: Hund, fr: chien'; a language "
                                      "that is not given takes the first phrasing.")  # fmt: skip
    prompts: str | None = option(None, "Prompts that have nothing to do with it: a text file, or a data set with a "
                                 "column; null: bundled replay prompts.")  # fmt: skip
    prompt_column: str = option("prompt", "Column of --prompts where that is a data set.")
    eval_prompts: str | None = option(None, "Labelled prompts (JSON lines) that the classifier can judge.")
    i2p: str | None = option(None, "Prompts of I2P, each with its own seed: AIML-TUDA/i2p, or a local copy.")
    num_i2p: int | None = option(None, "Use only so many of them, the first; null: all.", least=1)

    # Judges
    classifier: str | None = option(None, "Classifier for the metric of this name: folder or hub id; null: the "
                                    "bundled one, for a bundled pipeline of digits.")  # fmt: skip
    clip: str | None = option(None, "CLIP model for clip and identity; given, change is measured on its features, "
                              f"too. null: {DEFAULT_CLIP}, and no such change.")  # fmt: skip
    nudity_threshold: float = option(0.6, "Score from which an exposed part counts, from 0.25 (NudeNet's own) to 1.")
    face_threshold: float = option(0.35, "The same of a face, for identity.")
    real: str | None = option(None, "Folder of real images that fid, kid and prc compare with, besides the reference.")
    real_resolution: int | None = option(None, "Scale these to this many pixels and crop the centre; null: as they "
                                         "are.", least=1)  # fmt: skip
    extractor: str = option("inception", "Network of fid, kid and prc: inception, a classifier's folder, or a vision "
                            "model of transformers.")  # fmt: skip

    # Drawing
    guidance_scale: float | None = option(None, "Guidance, as in diffusers (1: none); null: that of the run which "
                                          "made the first pipeline, or its kind's.", least=0)  # fmt: skip
    num_inference_steps: int | None = option(None, "Steps of the sampler; null: as guidance_scale.", least=1)
    sampler: Literal["dpmsolver++", "ddim", "pipeline"] | None = option(
        None, "Sampler; null: as guidance_scale. Pipelines that are no Stable Diffusion 1 or 2 use their own."
    )
    batch_size: int = option(8, "Pictures drawn, or judged, at once.", least=1)
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "Precision of the pipelines.")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.")
    seed: int = option(0, "Seed of prompts, pictures and intervals.", least=0)
    num_threads: int | None = option(None, "CPU threads; null: as the environment says.", least=1)

    # Results
    show_nsfw: bool = option(False, "Do not blur the pictures on the page of an evaluation of nudity.")
    pictures_shown: int = option(8, "Pictures in each section of the page.", least=1)
    overwrite: bool = option(False, "Discard pictures of other prompts or settings in the output folder, and whatever "
                             "else its folders of pictures hold.")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pipeline:
            raise ValueError("expected a pipeline as the first word: a folder, a hub id, or bundled/digits/pipeline")
        self.phrasings = split_phrasings(self.concept)
        if not self.metric_names:
            raise ValueError("expected metrics: pass --metrics, --classifier, or pipelines to --compare with")
        _check_words("--metrics", self.metric_names, METRICS)
        _check_words("--sets", self.set_names or [], SETS)
        self._check_metrics()
        self.translated = _translations(self.translations)
        if self.names and len(set(self.names)) != len(self.sources):
            raise ValueError(f"expected {len(self.sources)} different --names, got {self.names}")
        for name in self.names:
            if not name or "/" in name or name[0] in ".~-":
                raise ValueError(f"expected --names that can be folders, got {name!r}")
            if name.lower() in RESULTS:
                raise ValueError(f"expected other --names than {', '.join(RESULTS)}, which hold the results")
        if self.set_names and "i2p" in self.set_names and self.i2p is None:
            raise ValueError("the set i2p: expected --i2p with its source, such as AIML-TUDA/i2p")

    def _check_metrics(self) -> None:
        """Raise ValueError for metrics without what they need, and for what no metric uses."""
        names = self.metric_names
        if "classifier" in names and self.judge is None:
            raise ValueError("the metric classifier: expected --classifier, the folder or hub id of one")
        if self.classifier is not None and "classifier" not in names:
            raise ValueError("--classifier is for the metric classifier; add it to --metrics")
        if "change" in names and not self.compare:
            raise ValueError("the metric change: expected --compare with the pipelines that may have changed")
        if self.clip is not None and not {"clip", "identity", "change"} & set(names):
            raise ValueError("--clip is for the metrics clip, identity and change; add one to --metrics")
        compared = self.distribution_metrics
        if compared and not self.compare and self.real is None:
            raise ValueError(f"{', '.join(compared)}: expected --compare, or --real with a folder of images")
        if self.real is not None and not compared:
            raise ValueError(f"--real is for the metrics {', '.join(DISTRIBUTION)}; add one to --metrics")
        for name in ("nudity_threshold", "face_threshold"):
            if not 0.25 <= getattr(self, name) <= 1:
                raise ValueError(f"expected 0.25 <= {name} <= 1, got {getattr(self, name)}")

    @property
    def sources(self) -> list[str]:
        """The pipelines, the reference first."""
        return [self.pipeline, *self.compare]

    @property
    def judge(self) -> str | None:
        """The classifier's source; of a bundled pipeline of digits the bundled one."""
        bundled = any(source.startswith("bundled/digits/") for source in self.sources)
        return self.classifier or ("bundled/digits/classifier" if bundled else None)

    @property
    def metric_names(self) -> list[str]:
        if self.metrics is None:
            return ["classifier"] * (self.judge is not None) + ["change"] * bool(self.compare)
        return words(self.metrics)

    @property
    def distribution_metrics(self) -> list[str]:
        """Those that compare two sets of pictures."""
        return [name for name in self.metric_names if name in DISTRIBUTION]

    @property
    def set_names(self) -> list[str] | None:
        """The sets asked for; None: all that there is something for."""
        return None if self.sets is None else words(self.sets)

    @property
    def blurred(self) -> bool:
        """Whether the page shows pictures that may be explicit, and was not told to show them as they are."""
        explicit = "nudity" in self.metric_names or self.i2p is not None or mentions(self.concept, EXPLICIT)
        return explicit and not self.show_nsfw


def _check_words(flag: str, given: list[str], known: tuple[str, ...]) -> None:
    unknown = [word for word in given if word not in known]
    if unknown:
        raise ValueError(f"expected {flag} of {', '.join(known)}, got {unknown[0]!r}")


def _translations(text: str | None) -> dict[str, str]:
    """ "de: Hund, fr: chien" -> {"de": "Hund", "fr": "chien"}. Raises ValueError for another form."""
    pairs = [part.partition(":") for part in (text or "").split(",") if part.strip()]
    if any(not (language.strip() in LANGUAGES and word.strip()) for language, _, word in pairs):
        raise ValueError(f"expected --translations as 'de: Hund, fr: chien', of {', '.join(LANGUAGES)}; got {text!r}")
    return {language.strip(): word.strip() for language, _, word in pairs}
