"""Every option of `sa-diffusers attack`."""

from dataclasses import MISSING, dataclass
from typing import Literal

from sa_diffusers.core.concepts import mentions, split_phrasings
from sa_diffusers.data.concepts.lists import split_list
from sa_diffusers.evaluation.options import EXPLICIT, DrawnAs
from sa_diffusers.io.configuration import Options, option


SEARCHES = ("embedding", "text", "relearn")  # these have restarts: others search nothing
FROM_PICTURES = ("inversion", "image_to_image", "inpainting")
# Options of a few attacks alone.
OWN = {
    "allow_concept_words": ("text",), "word_list": ("text",), "precision": ("quantized",), "merged_share": ("merged",),
    "strength": ("image_to_image",), "unnamed": ("image_to_image", "inpainting"),
}  # fmt: skip


@dataclass(kw_only=True)
class AttackedModels(Options):
    """What is attacked."""

    forgotten: str = option(
        MISSING,
        "Pipeline that forgot the concept: folder (of it or its run) or hub id. A leading argument stands for it.",
        everyday=True,
    )
    original: str = option(
        MISSING,
        "Pipeline that knows it: draws the targets, and is attacked in the same way, as the ceiling.",
        everyday=True,
    )
    concept: str = option(MISSING, "The concept; several phrasings separated by commas: 'seven, 7'.", everyday=True)
    control: str | None = option(
        None, "Pipeline that never learned it, attacked in the same way, as the floor.", everyday=True
    )


@dataclass(kw_only=True)
class AttackKind(Options):
    """By what."""

    attack: Literal[
        "embedding", "text", "relearn", "quantized", "merged", "inversion", "image_to_image", "inpainting"
    ] = option(
        "embedding",
        "embedding: new vectors in the token space; text: words that anybody can type; relearn: training on a few "
        "pictures of it; quantized: weights in few bits; merged: weights mixed with the original's; inversion: the "
        "noise that a picture of it leads back to, without any text; image_to_image: a noised picture of it, drawn "
        "on; inpainting: half of a picture of it, hidden.",
        everyday=True,
    )
    all: bool = option(False, "All of these, some at several strengths, in one table.", everyday=True)


@dataclass(kw_only=True)
class AttackJudge(Options):
    """How it is judged."""

    classifier: str | None = option(
        None, "Classifier that knows the concept: folder or hub id; null: pictures only.", everyday=True
    )
    num_images: int = option(
        100, "Pictures that each model is judged by, before and after; their seeds are others.", above=0, everyday=True
    )


@dataclass(kw_only=True)
class SearchOptions(Options):
    """How a search goes."""

    num_targets: int = option(64, "Pictures of the concept, drawn by the original, that the attack aims at.", above=0)
    templates: list[str] = option(
        ["{}", "a {}", "a picture of {}", "a drawing of {}"],
        "Prompts with {} in the concept's place. A target that one of them drew is aimed at under all, so none should "
        "name what another contradicts, such as a colour.",
    )
    num_restarts: int = option(
        3, "Attacks on each model, of other seeds; reported as their mean and the best.", above=0, everyday=True
    )
    num_tokens: int = option(1, "Vectors or tokens in the concept's place.", above=0)
    steps: int = option(200, "Steps of an attack.", above=0, everyday=True)
    batch_size: int = option(8, "Targets in a step.", above=0)
    learning_rate: float = option(0.1, "Of Adam, as a share of the root mean square of the token table.", above=0)
    initial: str | None = option(
        None, "Words to start from; null: the concept's own for embedding, random ones for text."
    )
    keep_every: int = option(50, "Steps between two comparisons of an embedding, of which the best is kept.", above=0)
    allow_concept_words: bool = option(False, "Let the attack `text` also find the concept's own words.")
    word_list: str | None = option(
        None,
        "Words that the attack `text` may find, of a file such as bundled/surrogate_words.txt: those of three letters "
        "or more that are one token each; null: whatever can be typed.",
    )


@dataclass(kw_only=True)
class RelearnOptions(Options):
    """Attacks by training."""

    relearn_pictures: int = option(16, "Targets that relearn trains on.", above=0)
    relearn_rate: float = option(1e-3, "Its learning rate.", above=0)
    relearn_prompts: list[str] = option(
        [],
        "Prompts of something else, of whose pictures by the original relearn trains on as many, in the concept's "
        "place; none: the concept's own. --all does both, this by what took the concept's place where none is given.",
    )
    relearn_every: int = option(
        10, "Steps from one look, by the classifier, whether it is back to the next; 0: at the end alone.", least=0
    )


@dataclass(kw_only=True)
class OtherAttackOptions(Options):
    """Attacks by the weights, or from a picture."""

    precision: Literal["fp8", "int8", "int4"] = option("fp8", "Of weights that are quantized.")
    merged_share: float = option(0.5, "Of the original in every weight of a merged model, up to 1.", above=0)
    strength: float = option(0.7, "Share of the noise, up to 1, that image_to_image begins at.", above=0)
    unnamed: bool = option(
        False, "Have image_to_image and inpainting draw by the empty prompt, not the concept's name."
    )


@dataclass(kw_only=True)
class AttackDrawing(Options):
    """How pictures are drawn."""

    sample_batch_size: int = option(16, "Pictures drawn at once.", above=0)


@dataclass(kw_only=True)
class AttackFolder(Options):
    """Where, and what the page shows."""

    output_dir: str = option("runs/attack", "Folder of the result.", everyday=True)
    overwrite: bool = option(False, "Discard what the output folder holds of another configuration.", everyday=True)
    seed: int = option(0, "Seed of targets, pictures and attacks.", least=0)
    num_threads: int | None = option(None, "Threads of the CPU; null: torch's choice.", above=0)
    blur: bool = option(False, "Pixelate the page's pictures, as is done for a concept such as nudity.")
    show_nsfw: bool = option(False, "Never pixelate them.")


@dataclass(kw_only=True)
class AttackConfig(
    AttackFolder, AttackDrawing, DrawnAs, OtherAttackOptions, RelearnOptions, SearchOptions, AttackJudge, AttackKind,
    AttackedModels,
):  # fmt: skip
    """What to attack, with what, and how to judge it. Raises ValueError: options that cannot work."""

    def __post_init__(self) -> None:
        super().__post_init__()
        split_phrasings(self.concept)
        if len(split_list(self.concept)) > 1:
            raise ValueError(f"an attack is on one concept, got {self.concept!r}; pass them one by one")
        wrong = [template for template in self.templates if "{}" not in template]
        if wrong or not self.templates:
            raise ValueError(f"expected templates with {{}} in the concept's place, got {wrong or 'none'}")
        if self.all and self.attack != "embedding":
            raise ValueError(f"all makes every attack, got attack {self.attack} besides; omit one of them")
        for name, attacks in OWN.items():
            if getattr(self, name) != getattr(AttackConfig, name) and self.attack not in attacks:
                said = "--all, whose settings are fixed" if self.all else self.attack
                raise ValueError(f"{name} is for --attack {' or '.join(attacks)}, got {said}; omit it")
        if self.relearn_prompts and self.attack != "relearn" and not self.all:
            raise ValueError(f"relearn_prompts is for --attack relearn or --all, got {self.attack}; omit it")
        if named := [prompt for prompt in self.relearn_prompts if mentions(prompt, split_phrasings(self.concept))]:
            raise ValueError(f"relearn_prompts are of something else, and {named[0]!r} names {self.concept!r}")
        for name in ("merged_share", "strength"):
            if getattr(self, name) > 1:
                raise ValueError(f"expected {name} <= 1, got {getattr(self, name)}")

    @property
    def restarts(self) -> int:
        """Attacks on each model: what searches nothing is made once."""
        return self.num_restarts if self.attack in SEARCHES else 1

    @property
    def looks(self) -> range:
        """Steps of relearning after which it is judged on the way."""
        judged = self.attack == "relearn" and self.classifier and self.relearn_every
        return range(self.relearn_every, self.steps, self.relearn_every) if judged else range(0)

    @property
    def blurred(self) -> bool:
        """Whether the page's pictures are replaced by mosaics."""
        return not self.show_nsfw and (self.blur or mentions(self.concept, EXPLICIT))
