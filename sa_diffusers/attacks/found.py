"""What an attack found, vectors or a text in the concept's place, and what a model draws with it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sa_diffusers.attacks.pictures import FoundPictures
from sa_diffusers.attacks.relearning import FoundAdapter
from sa_diffusers.attacks.weights import FoundWeights
from sa_diffusers.families import Family
from sa_diffusers.families.text_to_image.template_encoder import PLACE, TemplateEncoder
from sa_diffusers.io.atomic_files import explain_read_errors, load_tensors, read_json, save_tensors, write_json
from sa_diffusers.io.processes import progress_bar


@dataclass(frozen=True, eq=False)
class FoundEmbedding:
    """What `attack_embedding` found: vectors [K, D], float32, on the CPU; in the space of the token table.

    Their `losses` are on the fixed set of targets at the start, after every `keep_every` steps, and at the end; the
    vectors are those of the lowest.
    """

    vectors: Tensor
    losses: list[float]

    def save(self, path: str | Path) -> None:
        save_tensors({"vectors": self.vectors}, path, losses=self.losses)

    @classmethod
    def load(cls, path: str | Path) -> "FoundEmbedding":
        tensors, notes = load_tensors(path)
        with explain_read_errors(path):
            return cls(**tensors, **notes)


@dataclass(frozen=True)
class FoundText:
    """What `attack_text` found: a text that reads as K `token_ids`, alone and in each of the attack's templates.

    Its `losses` are the lowest so far, at the times of `FoundEmbedding`'s.
    """

    text: str
    token_ids: list[int]
    losses: list[float]

    def save(self, path: str | Path) -> None:
        write_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> "FoundText":
        with explain_read_errors(path):
            return cls(**read_json(path))


Found = FoundEmbedding | FoundText | FoundAdapter | FoundWeights | FoundPictures


@torch.no_grad()
def draw_found(
    family: Family,
    found: Found,
    templates: Sequence[str],
    seeds: Sequence[int],
    guidance_scale: float,
    num_inference_steps: int,
    batch_size: int = 32,
) -> Tensor:
    """Draw templates with what was found in the place of {}: latents [N, C, h, w], one a seed, templates in turn; see
    `FoundPictures.draw`.

    Raises:
        ValueError: a template without {}; with vectors, one that is too long, or vectors of another model's width.
    """
    settings = guidance_scale, num_inference_steps, batch_size
    if isinstance(found, FoundAdapter | FoundWeights):
        with found.applied(family):
            return draw_found(family, FoundText(found.text, [], []), templates, seeds, *settings)
    without = [template for template in templates if PLACE not in template]
    if without or not templates or not seeds:
        raise ValueError(f"expected seeds, and templates with {{}} where the concept goes, got {without or 'none'}")
    if isinstance(found, FoundPictures):
        return found.draw(family, templates, seeds, *settings)
    encoder = None if isinstance(found, FoundText) else TemplateEncoder(family, templates, len(found.vectors))
    if encoder is not None and sum(encoder.widths) != found.vectors.shape[1]:
        raise ValueError(f"expected vectors [K, {sum(encoder.widths)}], got {list(found.vectors.shape)}")
    latents = []
    starts = range(0, len(seeds), batch_size)
    for start in progress_bar(starts, "draw", "batches"):
        own = seeds[start : start + batch_size]
        rows = [(start + place) % len(templates) for place in range(len(own))]
        if encoder is None:
            embedded = family.embed([templates[row].replace(PLACE, found.text) for row in rows])
        else:
            with family.encoders_at_hand():
                embedded = encoder(found.vectors.to(family.device), rows)
        latents.append(family.draw_embedded(embedded, own, guidance_scale, num_inference_steps))
    return torch.cat(latents)
