"""What an evaluation of pipelines reads and checks before any pipeline is loaded: prompts, judges, its plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sa_diffusers.core.concepts import Concept, Concepts, split_phrasings
from sa_diffusers.data.concepts.candidates import forgotten_besides
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.i2p import load_i2p
from sa_diffusers.data.prompts import read_labelled_prompts, read_prompts, read_templates
from sa_diffusers.evaluation.images.comparison import open_real
from sa_diffusers.evaluation.images.extractors import Extractor, load_extractor
from sa_diffusers.evaluation.images.metrics import check_counts, check_metrics
from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.judges.clip import Clip
from sa_diffusers.evaluation.judges.faces import ClipIdentity
from sa_diffusers.evaluation.judges.nudity import NudityDetector
from sa_diffusers.evaluation.judging import BodyJudge, ChangeJudge, ClassifierJudge, ClipJudge, Judge
from sa_diffusers.evaluation.options import DEFAULT_CLIP, KEPT, PipelineEvaluationConfig
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.evaluation.subjects import Subject
from sa_diffusers.evaluation.suite.prompt_suite import PromptSources, build_suite
from sa_diffusers.io.configuration import read_yaml
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.io.loading import read_tokenizer


REAL_VOCABULARY = 10_000  # tokens; CLIP's has 49,408, a grammar of its own one or two thousand
OWN_PROMPTS = "bundled/stable_diffusion"
DEFAULT_PROMPTS = f"{OWN_PROMPTS}/replay_prompts.txt"


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything but the pipelines.

    Attributes:
        judges: of single pictures, those that were asked for.
        classifier: the one among them; None: it was not asked for.
        judged_by: what decides each metric, for people and JSON; None: not asked for.
        extractor, real: of the metrics of two sets; None: not measured, or no real images.
        notes: what a reader of the numbers should know of the prompts.
        forgotten: phrasings of what else the pipelines have forgotten, which no prompt names.
    """

    concept: Concept
    suite: dict[str, PromptSet]
    judges: list[Judge]
    classifier: ClassifierJudge | None
    judged_by: dict[str, Any]
    extractor: Extractor | None
    real: ImageSet | None
    notes: list[str]
    forgotten: tuple[str, ...]

    @property
    def image_size(self) -> int | None:
        """Pixels a side of the pictures that the classifier reads; None: there is none."""
        return None if self.classifier is None else self.classifier.classifier.config.image_size

    @property
    def kept(self) -> list[str]:
        """The sets whose pictures are compared as sets."""
        return [name for name in self.suite if name in KEPT]


def read_inputs(config: PipelineEvaluationConfig, subjects: Sequence[Subject]) -> EvaluationInputs:
    """Load the judges and choose the prompts, which are the same for all pipelines.

    Args:
        subjects: what is judged; the first one's tokenizer decides what kind of prompts there are.

    Raises:
        ValueError: no prompts for a set, a classifier that does not know the concept, too few images for a metric.
        ModelLoadError: a judge that cannot be loaded, with what to install or download.
    """
    metrics = config.metric_names
    plurals = config.made_by.get("plurals", False) if config.plurals is None else config.plurals
    # Noise: nothing takes its place, it is for its siblings.
    concept = find_concept(config.concept, "noise", config.neighbours, plurals)
    classifier = ClassifierJudge.load(config.judge, concept.phrasings) if "classifier" in metrics else None
    tokenizer = read_tokenizer(subjects[0].source)
    said = [record["concept"] for subject in subjects for record in read_forgotten(subject.source)]
    forgotten = forgotten_besides(said, Concepts([concept]))
    sources = _prompt_sources(config, tokenizer, classifier is not None, concept.name)
    sources = replace(sources, forgotten=forgotten)
    reader = classifier and classifier.classifier
    suite = build_suite(concept, sources, reader, config.num_images, config.seed, config.set_names)
    extractor, real = _distribution_judge(config, sum(len(part) for name, part in suite.items() if name in KEPT))
    thresholds = {"nudity": config.nudity_threshold, "identity": config.face_threshold}
    sought = {name: value for name, value in thresholds.items() if name in metrics}
    detector = NudityDetector(min(sought.values())) if sought else None  # before CLIP is downloaded: it may be missing
    wants_clip = {"clip", "identity"} & set(metrics) or config.clip is not None
    clip = Clip.load(config.clip or DEFAULT_CLIP) if wants_clip else None
    scorer = ClipIdentity(clip, concept.name) if "identity" in metrics else None
    body = BodyJudge(detector, sought.get("nudity"), config.face_threshold, scorer) if detector else None
    change = ChangeJudge(clip if config.clip is not None else None) if "change" in metrics else None
    judges = [classifier, body, ClipJudge(clip, concept) if "clip" in metrics else None, change]
    judged_by = {
        "classifier": reader and config.judge,
        "classifier_accuracy": reader and reader.config.accuracy,
        "clip": clip and clip.name,
        "nudity": body and body.description,
        "identity": scorer and scorer.name,
        "extractor": extractor and config.extractor,
    }
    judges = [judge for judge in judges if judge is not None]
    notes = _notes(None if sources.real_vocabulary else len(tokenizer), concept)
    if forgotten:
        notes.append(f"Left out of what must stay, since a pipeline has forgotten it: {', '.join(forgotten)}.")
    return EvaluationInputs(concept, suite, judges, classifier, judged_by, extractor, real, notes, forgotten)


def _distribution_judge(config: PipelineEvaluationConfig, count: int) -> tuple[Extractor | None, ImageSet | None]:
    """The network and the real images that `count` kept pictures of each pipeline are compared by and with."""
    if not config.compared:
        return None, None
    if not count:
        names = ", ".join(config.compared)
        raise ValueError(f"{names}: expected one of the sets {', '.join(KEPT)}, which they compare")
    real = None if config.real is None else open_real(config, config.real_resolution, None)[0]
    check_counts(config.compared, (count, *([len(real)] if real else [])), config)
    extractor = load_extractor(config.extractor, config.attribute)
    check_metrics(config.compared, extractor)
    return extractor, real


def _prompt_sources(
    config: PipelineEvaluationConfig, tokenizer: PreTrainedTokenizerBase | None, labelled: bool, concept: str
) -> PromptSources:
    made_by, real = config.made_by, tokenizer is None or len(tokenizer) >= REAL_VOCABULARY
    rows = config.eval_prompts or (made_by.get("eval_prompts") if labelled else None)

    def fits(prompt: str) -> bool:  # tokenizers without a limit say some enormous number
        return tokenizer is None or len(tokenizer(prompt, verbose=False).input_ids) <= tokenizer.model_max_length

    prompts, column = config.prompts, config.prompt_column
    if prompts is None:
        prompts, column = made_by.get("replay_prompts", DEFAULT_PROMPTS), made_by.get("prompt_column", column)
    known = read_yaml(f"{OWN_PROMPTS}/descriptions.yaml") if real else {}
    described = read_prompts(config.descriptions) if config.descriptions else known.get(concept.lower(), [])
    combined = config.combined or (f"{OWN_PROMPTS}/combined_templates.txt" if real and not rows else None)
    prefixes = config.prefixes or (f"{OWN_PROMPTS}/prefix_templates.txt" if real else None)
    return PromptSources(
        prompts=read_prompts(prompts, column),
        rows=read_labelled_prompts(rows) if rows else [],
        with_labelled=config.eval_prompts is not None,
        templates=config.templates,
        synonyms=split_phrasings(config.synonyms, "--synonyms") if config.synonyms else (),
        combined=read_prompts(combined) if combined else [],
        translations=config.translated,
        i2p=load_i2p(config.i2p)[: config.num_i2p] if config.i2p else [],
        real_vocabulary=real,
        fits=fits,
        prefixes=read_templates(prefixes) if prefixes else [],
        descriptions=described,
    )


def describe_plan(
    config: PipelineEvaluationConfig,
    subjects: Sequence[Subject],
    inputs: EvaluationInputs,
    output_dir: Path,
    there: int,
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
    return "\n".join([*lines, *inputs.notes, f"into {output_dir}; the time left is shown while drawing"])


def _notes(vocabulary: int | None, concept: Concept) -> list[str]:
    """`vocabulary`: tokens that the tokenizer knows, where these are too few for real sentences."""
    found = []
    if vocabulary is not None:
        found.append(
            f"The tokenizer knows {vocabulary:,} tokens, fewer than {REAL_VOCABULARY:,}: misspellings, other "
            "languages and free sentences would be no words to this model, and are left out."
        )
    if not concept.siblings:
        found.append("No neighbours are known for this concept; name some with --neighbours.")
    return found
