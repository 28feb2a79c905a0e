"""How easily the concept comes back: a white-box search, the same for every pipeline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from sa_diffusers.attacks import AttackSettings, attack_embedding, attack_text, draw_found
from sa_diffusers.core.batches import Batch, map_tensors
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.families import Family, get_family
from sa_diffusers.io.artifacts import hash_tensors
from sa_diffusers.io.loading import load_pipeline, model_hash, pipeline_hashes
from studies.kept import Kept, kept
from studies.rivals.judging import Judge


@dataclass(frozen=True)
class Attack:
    """One search for the concept in a pipeline that was made to forget it, or never knew it.

    Attributes:
        judge: of the concept; reads what is drawn.
        targets: latents [N, C, h, w] of the concept, by the pipeline before forgetting.
        steps: of Adam.
        num_images: drawn with what was found.
        num_tokens: vectors, or words that can be typed.
        typed: search for such words, none of them the concept's.
        search: number of the search; of others the start (of words) and every draw differ.
    """

    judge: Judge
    targets: Tensor
    steps: int = 200
    num_images: int = 60
    num_tokens: int = 1
    typed: bool = False
    search: int = 0

    def run(self, pipeline_dir: str, path: Path, part: str | None = None) -> Tensor:
        """Probability of the concept [num_images] in pictures drawn with what was found; kept in `path`.

        Args:
            part: of a text that alone tells of what is found, "tokens" or "pooled"; None: all that the model reads.
        """
        pipeline = load_pipeline(pipeline_dir, None, None, "float32")
        spec, config, seed = self.judge.spec, self.judge.config, self.judge.seed
        own = derive_seed(seed, "search", self.search) if self.search else seed
        settings = AttackSettings(steps=self.steps, seed=own, num_tokens=self.num_tokens)
        identity = (
            {
                "model": pipeline_hashes(pipeline),
                "guided": {k: v for k, v in pipeline.config.items() if k.startswith("safety_")},
                "targets": hash_tensors({"targets": self.targets}),
                "settings": asdict(settings) | {"num_images": self.num_images, "templates": spec.attack_templates},
                "concept": [config.concept, self.judge.judge.attribute, self.judge.judge.index],
                "classifier": model_hash(self.judge.classifier),
                "drawing": [config.guidance_scale, config.num_inference_steps, config.sampler],
            }
            | ({"typed": True} if self.typed else {})
            | ({} if part is None else {"part": part})
        )

        def search() -> Kept:
            family = get_family(pipeline, sampler=config.sampler)
            if part:
                tell_by(family, part)
            words = find_concept(config.concept, config.surrogate).phrasings
            known = family, self.targets, spec.attack_templates, words, settings
            found = attack_text(*known, words) if self.typed else attack_embedding(*known)
            seeds = [derive_seed(seed, "attacked", index) for index in range(self.num_images)]
            sampling = (config.guidance_scale, config.num_inference_steps)
            images = family.decode(draw_found(family, found, spec.attack_templates, seeds, *sampling))
            probability = self.judge.classifier.probabilities(images)[self.judge.judge.attribute]
            values = {"probability": probability[:, self.judge.judge.index]}
            values |= {} if self.typed else {"vectors": found.vectors}
            return values, {"losses": found.losses} | ({"text": found.text} if self.typed else {})

        return kept(path, "attack", identity, search)[0]["probability"]


def tell_by(family: Family, part: str) -> None:
    """Have the model be told of a text by one part of its embedding, and of the empty one by the others."""
    encode, empty = family.encode_prompts, family.text_parts(family.embed([""]))

    def encode_part(prompts: Sequence[str]) -> Batch:
        found = encode(prompts)
        names = {id(tensor): name for name, tensor in family.text_parts(found).items() if name != part}
        return map_tensors(
            found, lambda one: empty[names[id(one)]].to(one).expand_as(one) if id(one) in names else one
        )

    family.encode_prompts = encode_part


def parts_of(judge: Judge) -> list[str]:
    """The parts of a text that the model reads, where they are several."""
    family = get_family(load_pipeline(judge.spec.options["model"], None, None, "float32"))
    parts = list(family.text_parts(family.embed([""])))
    return parts if len(parts) > 1 else []


def draw_targets(judge: Judge, model: str, count: int = 48) -> Tensor:
    """Latents of the concept [count, C, h, w], as the pipeline draws it that knows it."""
    family = get_family(load_pipeline(model, None, None, "float32"), sampler=judge.config.sampler)
    words = find_concept(judge.config.concept, judge.config.surrogate).phrasings
    prompts = [t.format(word) for t in judge.spec.attack_templates for word in words]
    asked = [Condition(prompts[index % len(prompts)]) for index in range(count)]
    seeds = [derive_seed(judge.seed, "attack target", index) for index in range(count)]
    return family.draw(asked, seeds, judge.config.guidance_scale, judge.config.num_inference_steps)
