"""What an evaluation of pipelines reads and checks before any pipeline is loaded: prompts, judges, its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sa_diffusers.core.concepts import Concept, split_phrasings
from sa_diffusers.data.concepts import find_concept
from sa_diffusers.data.i2p import load_i2p
from sa_diffusers.data.prompts import read_labelled_prompts, read_prompts
from sa_diffusers.evaluation.images.extractors import Extractor, load_extractor
from sa_diffusers.evaluation.images.metrics import check_counts, check_metrics
from sa_diffusers.evaluation.images.options import MetricSettings
from sa_diffusers.evaluation.images.sets import ImageFolder
from sa_diffusers.evaluation.judges.clip import Clip
from sa_diffusers.evaluation.judges.faces import ClipIdentity
from sa_diffusers.evaluation.judges.nudity import NudityDetector
from sa_diffusers.evaluation.suite.judging import BodyJudge, ChangeJudge, ClassifierJudge, ClipJudge, Judge
from sa_diffusers.evaluation.suite.options import DEFAULT_CLIP, KEPT, PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.prompt_suite import PromptSet, PromptSources, build_suite
from sa_diffusers.evaluation.suite.subjects import REAL_VOCABULARY, Subject
from sa_diffusers.io.loading import read_tokenizer
from sa_diffusers.io.processes import process_state


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything but the pipelines.

    Attributes:
        vocabulary: tokens that the first pipeline's tokenizer knows; None: it has none by that name.
        judges: of single pictures, those that were asked for, by name: classifier, body, clip, change.
        clip_name: of the CLIP model that any of them uses.
        extractor, real: of fid, kid and prc; None: not measured, or no folder of real images.
    """

    concept: Concept
    vocabulary: int | None
    suite: dict[str, PromptSet]
    judges: dict[str, Judge]
    clip_name: str | None
    extractor: Extractor | None
    real: ImageFolder | None

    @property
    def classifier(self) -> ClassifierJudge | None:
        return self.judges.get("classifier")

    @property
    def body(self) -> BodyJudge | None:
        return self.judges.get("body")

    @property
    def image_size(self) -> int | None:
        """Pixels a side of the pictures that the classifier reads; None: there is none."""
        return None if self.classifier is None else self.classifier.classifier.config.image_size

    @property
    def kept(self) -> list[str]:
        """The sets whose pictures fid, kid and prc compare."""
        return [name for name in self.suite if name in KEPT]


def read_inputs(config: PipelineEvaluationConfig, subject: Subject) -> EvaluationInputs:
    """Load the judges and choose the prompts.

    Args:
        subject: the first pipeline, whose tokenizer decides what kind of prompts there are.

    Raises:
        ValueError: no prompts for a set, a classifier that does not know the concept, too few images for a metric.
        ModelLoadError: a judge that cannot be loaded, with what to install or download.
    """
    metrics = config.metric_names
    concept = find_concept(config.concept, "noise", config.neighbours)  # for its siblings: nothing takes its place
    judge = None
    if "classifier" in metrics:
        judge = ClassifierJudge.load(config.judge, concept.phrasings, "--metrics without classifier")
        judge.classifier.to(process_state().device)
    tokenizer = read_tokenizer(subject.source)
    sources = _prompt_sources(config, tokenizer, judge is not None)
    suite = build_suite(concept, sources, judge and judge.classifier, config.num_images, config.seed, config.set_names)
    extractor, real = _distribution_judge(config, suite)
    body = _body_judge(config)  # before CLIP: a missing extra is told before a download
    wants_clip = {"clip", "identity"} & set(metrics) or config.clip is not None
    clip = Clip.load(config.clip or DEFAULT_CLIP) if wants_clip else None
    if "identity" in metrics:
        body.scorer = ClipIdentity(clip, concept.name)
    judges = {
        "classifier": judge,
        "body": body,
        "clip": ClipJudge(clip, concept) if "clip" in metrics else None,
        "change": ChangeJudge(clip if config.clip is not None else None) if "change" in metrics else None,
    }
    asked = {name: one for name, one in judges.items() if one is not None}
    vocabulary = None if tokenizer is None else len(tokenizer)
    return EvaluationInputs(concept, vocabulary, suite, asked, clip and clip.name, extractor, real)


def _body_judge(config: PipelineEvaluationConfig) -> BodyJudge | None:
    thresholds = {"nudity": config.nudity_threshold, "identity": config.face_threshold}
    wanted = {name: value for name, value in thresholds.items() if name in config.metric_names}
    if not wanted:
        return None
    return BodyJudge(NudityDetector(min(wanted.values())), wanted.get("nudity"), config.face_threshold)


def _distribution_judge(
    config: PipelineEvaluationConfig, suite: Mapping[str, PromptSet]
) -> tuple[Extractor | None, ImageFolder | None]:
    metrics = config.distribution_metrics
    if not metrics:
        return None, None
    count = sum(len(part) for name, part in suite.items() if name in KEPT)
    if not count:
        raise ValueError(f"{', '.join(metrics)}: expected one of the sets {', '.join(KEPT)}, which they compare")
    real = None if config.real is None else ImageFolder(config.real, config.real_resolution)
    check_counts(metrics, (count, *([len(real)] if real else [])), MetricSettings(seed=config.seed))
    extractor = load_extractor(config.extractor)
    check_metrics(metrics, extractor)
    return extractor, real


def _prompt_sources(
    config: PipelineEvaluationConfig, tokenizer: PreTrainedTokenizerBase | None, labelled: bool
) -> PromptSources:
    real_vocabulary = tokenizer is None or len(tokenizer) >= REAL_VOCABULARY
    kind = "stable_diffusion" if real_vocabulary else "digits"
    rows = config.eval_prompts or (None if real_vocabulary or not labelled else "bundled/digits/eval_prompts.jsonl")

    def fits(prompt: str) -> bool:  # tokenizers without a limit say some enormous number
        return tokenizer is None or len(tokenizer(prompt, verbose=False).input_ids) <= tokenizer.model_max_length

    return PromptSources(
        prompts=read_prompts(config.prompts or f"bundled/{kind}/replay_prompts.txt", config.prompt_column),
        rows=read_labelled_prompts(rows) if rows else [],
        with_labelled=config.eval_prompts is not None,
        templates=config.templates,
        synonyms=split_phrasings(config.synonyms, "--synonyms") if config.synonyms else (),
        combined=read_prompts(config.combined) if config.combined else [],
        translations=config.translated,
        i2p=load_i2p(config.i2p)[: config.num_i2p] if config.i2p else [],
        real_vocabulary=real_vocabulary,
        fits=fits,
    )


def describe_plan(
    config: PipelineEvaluationConfig, subjects: list[Subject], inputs: EvaluationInputs, output_dir: Path, there: int
) -> str:
    """What is about to be drawn, and how many pictures of it are `there` already."""
    per_pipeline = sum(map(len, inputs.suite.values()))
    lines = [
        f"judge what is left of {', '.join(inputs.concept.phrasings)!r} by {', '.join(config.metric_names)}",
        f"draw {per_pipeline:,} pictures a pipeline, {per_pipeline * len(subjects):,} in all, of which the folder "
        f"holds {there:,}",
        "  " + ", ".join(f"{name} {len(part):,}" for name, part in inputs.suite.items()),
    ]
    for subject in subjects:
        how = ", ".join(f"{k} {'its own' if v is None else v}" for k, v in vars(subject.settings).items())
        lines.append(f"  {subject.name}: {subject.source}, a {subject.class_name}; {how}")
    lines += notes(inputs)
    return "\n".join([*lines, f"into {output_dir}; the time left is shown while drawing"])


def notes(inputs: EvaluationInputs) -> list[str]:
    """What a reader of the numbers should know of the prompts."""
    found = []
    if inputs.vocabulary is not None and inputs.vocabulary < REAL_VOCABULARY:
        found.append(
            f"The tokenizer knows {inputs.vocabulary:,} tokens, fewer than {REAL_VOCABULARY:,}: misspellings, other "
            "languages and free sentences would be no words to this model, and are left out."
        )
    if not inputs.concept.siblings:
        found.append("No neighbours are known for this concept; name some with --neighbours.")
    return found
