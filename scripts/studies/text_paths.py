"""Which way a digit enters a model that reads a prompt as tokens and as a pooled vector: pictures of mixed prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sa_diffusers.core.batches import Batch, map_tensors
from sa_diffusers.core.seeding import derive_seed
from sa_diffusers.data.digits.captions import ATTRIBUTES, caption, random_attributes
from sa_diffusers.evaluation.intervals import wilson_interval
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.families import Family
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.io.processes import progress_bar


DIGITS = ATTRIBUTES["digit"]
# What tokens and pooled vector are of: a digit, another one, or the empty prompt.
CELLS = {
    "both": ("digit", "digit"),
    "tokens, of another digit pooled": ("digit", "other"),
    "pooled, of another digit tokens": ("other", "digit"),
    "tokens alone": ("digit", "empty"),
    "pooled alone": ("empty", "digit"),
}


@dataclass
class TextPathsConfig(Options):
    """Everything `scripts/text_paths.py` can be told."""

    model: str = option("bundled/digits_flow/pipeline", "Pipeline: folder, hub id or bundled.")
    classifier: str = option("bundled/digits/classifier", "Classifier: folder or bundled.")
    output_dir: str = option("runs/text_paths", "Folder of text_paths.json.")
    images_class: int = option(20, "Pictures of each digit in each row.", above=0)
    num_inference_steps: int = option(10, "Steps of the sampler.", above=0)
    guidance_scale: float = option(2.5, "Classifier-free guidance; 1: none.", least=0)
    batch_size: int = option(50, "Pictures drawn at once; changes no picture.", above=0)
    seed: int = option(0, "Seed of prompts and pictures.", least=0)


def mixed(family: Family, tokens: Sequence[str], pooled: Sequence[str]) -> Batch:
    """What a family makes of prompts, the pooled vectors in it those of other prompts.

    Raises:
        ValueError: the model reads no pooled text.
    """
    found, other = family.embed(tokens), family.text_parts(family.embed(pooled))
    kept = family.text_parts(found).get("pooled")
    if kept is None:
        raise ValueError("this model reads tokens alone; expected one that also reads a pooled text")
    return map_tensors(found, lambda tensor: other["pooled"] if tensor is kept else tensor)


def prompts_of(digit: str, index: int, seed: int) -> dict[str, str]:
    """The same sentence of a digit and of another one, and the empty prompt."""
    given = random_attributes(random.Random(f"text paths {seed} {digit} {index}"))
    other = DIGITS[(DIGITS.index(digit) + 1 + index % (len(DIGITS) - 1)) % len(DIGITS)]

    def sentence(name: str) -> str:
        return caption(given | {"digit": name}, random.Random(f"frame {seed} {digit} {index}"), keep=1.0)

    return {"digit": sentence(digit), "other": sentence(other), "empty": ""}


def measure(family: Family, classifier: ImageClassifier, config: TextPathsConfig) -> list[dict[str, Any]]:
    """One row a cell: the share of pictures that show the digit, with its 95 % interval."""
    wanted = [(digit, index) for digit in DIGITS for index in range(config.images_class)]
    prompts = [prompts_of(digit, index, config.seed) for digit, index in wanted]
    seeds = [derive_seed(config.seed, "text paths", number) for number in range(len(wanted))]
    truth = torch.tensor([DIGITS.index(digit) for digit, _ in wanted])
    rows = []
    for name, (tokens, pooled) in progress_bar(list(CELLS.items()), "draw", "rows"):
        read = []
        for start in range(0, len(wanted), config.batch_size):
            part = slice(start, start + config.batch_size)
            embedded = mixed(family, [p[tokens] for p in prompts[part]], [p[pooled] for p in prompts[part]])
            latents = family.draw_embedded(embedded, seeds[part], config.guidance_scale, config.num_inference_steps)
            read.append(classifier.probabilities(family.decode(latents))["digit"].argmax(1))
        shown = (torch.cat(read) == truth).float().mean().item()
        row = {"digit in": name, "tokens of": tokens, "pooled of": pooled, "shown": shown}
        rows.append(row | {"interval": wilson_interval(shown, len(wanted)), "pictures": len(wanted)})
    return rows
