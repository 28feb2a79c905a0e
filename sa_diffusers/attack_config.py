"""Every option of `scripts/attack.py`."""

from dataclasses import MISSING, dataclass, field
from typing import Literal

from sa_diffusers.config import option


def required(text: str):
    """A field without a default, with the text that --help prints."""
    return field(default=MISSING, metadata={"help": text})


@dataclass
class AttackConfig:
    """What to attack, with what, and how to judge it.

    Raises:
        ValueError: options that cannot work, before anything is loaded.
    """

    forgotten: str = required("Pipeline that forgot the concept: folder or hub id. A leading argument stands for it.")
    original: str = required(
        "Pipeline that knows it: draws the targets, and is attacked in the same way, as the ceiling."
    )
    concept: str = required("The concept; several phrasings separated by commas: 'seven, 7'.")
    control: str | None = option(None, "Pipeline that never learned it, attacked in the same way, as the floor.")
    attack: Literal["embedding", "text"] = option(
        "embedding", "embedding: new vectors in the token space; text: words that anybody can type."
    )
    classifier: str | None = option(None, "Classifier that knows the concept: folder or hub id; null: pictures only.")
    templates: list[str] = option(
        ["{}", "a {}", "a picture of {}", "a drawing of {}"], "Prompts with {} in the concept's place."
    )
    num_targets: int = option(64, "Pictures of the concept, drawn by the original, that the attack aims at.")
    num_images: int = option(100, "Pictures that each model is judged by, before and after; their seeds are others.")
    num_restarts: int = option(3, "Attacks on each model, of other seeds; reported as their mean and the best.")
    num_tokens: int = option(1, "Vectors or tokens in the concept's place.")
    steps: int = option(200, "Steps of an attack.")
    batch_size: int = option(8, "Targets in a step.")
    learning_rate: float = option(0.1, "Of Adam, as a share of the root mean square of the token table.")
    initial: str | None = option(
        None, "Words to start from; null: the concept's own for embedding, random ones for text."
    )
    keep_every: int = option(50, "Steps between two comparisons of an embedding, of which the best is kept.")
    allow_concept_words: bool = option(False, "Let the attack `text` find the concept's own words, too.")
    guidance_scale: float = option(7.5, "Guidance of all pictures, as in diffusers (1: none).")
    num_inference_steps: int = option(20, "Steps of the sampler.")
    sampler: Literal["dpmsolver++", "ddim", "pipeline"] = option("dpmsolver++", "Sampler; pipeline: the model's own.")
    sample_batch_size: int = option(16, "Pictures drawn at once.")
    seed: int = option(0, "Seed of targets, pictures and attacks.")
    num_threads: int | None = option(None, "Threads of the CPU; null: torch's choice.")
    output_dir: str = option("runs/attack", "Folder of the result.")
    overwrite: bool = option(False, "Discard what the output folder holds of another configuration.")
    blur: bool = option(False, "Blur the page's pictures until they are pointed at.")

    def __post_init__(self) -> None:
        for name in (
            "num_targets", "num_images", "num_restarts", "num_tokens", "steps", "batch_size", "keep_every",
            "num_inference_steps", "sample_batch_size", "num_threads",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        for name, lowest in (("learning_rate", 0.0), ("guidance_scale", 0.0)):
            if not getattr(self, name) > lowest:
                raise ValueError(f"expected {name} above {lowest:g}, got {getattr(self, name)}")
        wrong = [template for template in self.templates if "{}" not in template]
        if wrong or not self.templates:
            raise ValueError(f"expected templates with {{}} in the concept's place, got {wrong or 'none'}")
        if self.allow_concept_words and self.attack != "text":
            raise ValueError("allow_concept_words is for --attack text: an embedding has no words")
