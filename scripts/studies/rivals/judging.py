"""What one pipeline draws, picture by picture, so that every number of the table has an interval and a pair."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.prompts import read_labelled_prompts
from sa_diffusers.data.sampling import Request, SamplingSettings
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.examination import examination
from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.evaluation.judging import ClassifierJudge, judge_pictures
from sa_diffusers.evaluation.prompt_sets import PromptSet
from sa_diffusers.families import get_family
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.io.configuration import config_from_dict
from sa_diffusers.io.loading import load_pipeline, model_hash, pipeline_hashes
from sa_diffusers.report.pictures import to_uint8
from sa_diffusers.runs.options import ForgetConfig
from studies.kept import Kept, kept
from studies.rivals.spec import ConceptSpec


SHOWN = 8  # pictures of the concept, and as many of the rest, kept for the figure


@dataclass(frozen=True)
class Counts:
    """Pictures of each kind: of the concept, of it in unseen phrasings, of prompts that do not name it, of long ones,
    and of all other classes together, in phrasings that were not replayed."""

    concept: int = 40
    unseen: int = 120
    unnamed: int = 40
    long: int = 20
    retained: int = 270

    def scaled(self, share: float) -> "Counts":
        """Raises ValueError: a share that leaves nothing."""
        if not share > 0:
            raise ValueError(f"expected a share of pictures above 0, got {share}")
        return Counts(**{name: max(1, round(share * count)) for name, count in asdict(self).items()})


@dataclass
class Judge:
    """Draws the same prompts from the same seeds with every pipeline that is to forget one concept, and reads them.

    Raises:
        ValueError: a neighbour that is no class of the concept's attribute, or prompts that lack a kind.
    """

    spec: ConceptSpec
    classifier: ImageClassifier
    counts: Counts
    seed: int

    def __post_init__(self) -> None:
        self.config = config_from_dict(ForgetConfig, self.spec.options | {"seed": self.seed})
        concept = find_concept(self.config.concept, self.config.surrogate)
        self.judge = ClassifierJudge(self.classifier, *self.classifier.require_class(concept.phrasings))
        rows, counts = read_labelled_prompts(self.config.eval_prompts), self.counts
        per_class, other = -(-counts.retained // (len(self.judge.classes) - 1)), max(counts.unseen, counts.unnamed)
        exam = examination(self.judge, Concepts([concept]), rows, counts.concept, 0, other, self.seed)
        # What is to be kept is judged in phrasings that were not replayed either: all seen ones may have been.
        held_out = [row | {"form": "seen"} for row in rows if row["form"] == "held_out"]
        kept = examination(self.judge, Concepts([concept]), held_out, 0, per_class, 0, self.seed)["retained"]
        if unknown := [name for name in self.spec.neighbours if name not in self.judge.classes]:
            known = ", ".join(self.judge.classes)
            raise ValueError(f"{self.spec.name}: expected neighbours of {known}, got {unknown[0]!r}")
        texts = [t.format(p) for t in self.spec.long_templates for p in concept.phrasings]
        long = [texts[index % len(texts)] for index in range(counts.long)]
        seeds = [derive_seed(self.seed, "long prompt", index) for index in range(counts.long)]
        self.sets = {
            "concept": exam["concept"],
            "unseen": exam["unseen"].take(range(counts.unseen)),
            "unnamed": exam["unnamed"].take(range(counts.unnamed)),
            "long": PromptSet.of("asks", [Request(Condition(p), s) for p, s in zip(long, seeds, strict=True)]),
            "retained": kept,
        }
        self.settings = SamplingSettings(
            self.config.guidance_scale, self.config.num_inference_steps, self.config.eval_batch_size
        )

    @property
    def retained_classes(self) -> Tensor:
        """Index of the class [M] that each retained picture should show."""
        classes = self.judge.classes
        return torch.tensor([classes.index(label[self.judge.attribute]) for label in self.sets["retained"].labels])

    def groups(self, name: str) -> list[tuple[int, str]]:
        """What the pictures of a set have in common with others: their prompt, and the seed of the run."""
        return [(self.seed, request.condition.text) for request in self.sets[name].requests]

    @property
    def neighbours(self) -> Tensor:
        """Which retained pictures [M] are of a neighbour."""
        indices = [self.judge.classes.index(name) for name in self.spec.neighbours]
        return torch.isin(self.retained_classes, torch.tensor(indices))

    def read(self, pipeline_dir: str, path: Path, original: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Values of every picture, from `path` if they are there for this very pipeline, else measured and kept there.

        Args:
            pipeline_dir: of the pipeline to judge.
            original: what this returned for the pipeline before forgetting; None: it is this one.

        Returns:
            By name, one value a picture: probability of the concept (concept, unseen, long) and its entropy in nats;
            whether it shows though unnamed; for retained pictures whether the class is right, the share of the other
            named attributes that is right, and the root mean square change of the picture against the original's
            (pixels in [-1, 1]); `retained_pictures` [M, 3, H, W] uint8 of the original alone; `shown`.
        """
        pipeline = load_pipeline(pipeline_dir, None, None, "float32")
        identity = {
            "model": pipeline_hashes(pipeline),
            "guided": {k: v for k, v in pipeline.config.items() if k.startswith("safety_")},
            "classifier": model_hash(self.classifier),
            "requests": {name: [r.key for r in part.requests] for name, part in self.sets.items()},
            "labels": {name: part.labels for name, part in self.sets.items()},
            "settings": asdict(self.settings),
            "sampler": self.config.sampler,
            "original": None if original is None else hash_tensors({"": original["retained_pictures"]}),
        }

        def measure() -> Kept:
            images = draw_sets(get_family(pipeline, sampler=self.config.sampler), self.sets, self.settings)
            return self._values(images, original), {}

        return kept(path, "judged", identity, measure)[0]

    def _values(self, images: dict[str, ImageSet], original: dict[str, Tensor] | None) -> dict[str, Tensor]:
        read = {
            name: {measure: values.float() for measure, values in found.items()}
            for name, found in judge_pictures([self.judge], self.sets, images).items()
        }
        pictures = to_uint8(images["retained"].images(range(len(images["retained"]))))
        before = pictures if original is None else original["retained_pictures"]
        difference = (pictures.float() - before.float()) / 127.5
        shown = min(SHOWN, len(pictures), len(images["concept"]))
        spread = torch.linspace(0, len(pictures) - 1, shown).long()
        values = {
            "concept": read["concept"]["concept_probability"],
            "concept_entropy": read["concept"]["concept_entropy"],
            "concept_attributes": read["concept"]["attributes"],
            "unseen": read["unseen"]["concept_probability"],
            "long": read["long"]["concept_probability"],
            "unnamed": read["unnamed"]["concept_shown"],
            "retained": read["retained"]["accuracy"],
            "attributes": read["retained"]["attributes"],
            "change": difference.square().flatten(1).mean(1).sqrt(),
            "shown": torch.cat([to_uint8(images["concept"].images(range(shown))), pictures[spread]]),
        }
        return values if original is not None else values | {"retained_pictures": pictures}
