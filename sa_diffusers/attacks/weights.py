"""Bring a concept back by what is done to weights alone: rounding them to few bits, or a merge with the original's.

Rounding undoes changes that are smaller than its steps (of language models: Zhang et al. 2024, arXiv 2410.16454).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sa_diffusers.attacks.target_loss import AttackSettings, TargetLoss, frozen_model
from sa_diffusers.core.batches import Batch, to
from sa_diffusers.families import Family, get_family
from sa_diffusers.families.text_to_image.template_encoder import PLACE
from sa_diffusers.io.atomic_files import explain_read_errors, read_json, write_json
from sa_diffusers.io.loading import load_pipeline


BLOCK = 64  # weights of 4 bits that share a scale
NOTHING = torch.empty(0)  # the vectors of an attack that searches none


@contextmanager
def changed_weights(
    module: nn.Module, names: Iterable[str], change: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Within the block the weights of these names are what `change` makes of them; afterwards what they were."""
    before = {name: module.get_parameter(name).data for name in names}
    try:
        for name, weight in before.items():
            module.get_parameter(name).data = change(name, weight)
        yield
    finally:
        for name, weight in before.items():
            module.get_parameter(name).data = weight


def rounded(weight: Tensor, precision: str) -> Tensor:
    """A weight [out, ...] as it is read back from few bits, in its own dtype.

    Args:
        precision: fp8, cast to e4m3 without a scale, as ComfyUI and diffusers' layerwise casting load a model; int8,
            round(w / s) s with s = max |w| / 127 of each output, as LLM.int8; int4, s = max |w| / 7 of 64 in a row.
    """
    if precision == "fp8":
        most = torch.finfo(torch.float8_e4m3fn).max  # beyond it the cast gives no number
        return weight.clamp(-most, most).to(torch.float8_e4m3fn).to(weight.dtype)
    if precision == "int8":
        parts, levels = weight.flatten(1), 127
    else:
        parts, levels = functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK), 7
    scale = (parts.abs().amax(1, keepdim=True) / levels).clamp_min(torch.finfo(weight.dtype).tiny)
    return ((parts / scale).round() * scale).flatten()[: weight.numel()].view_as(weight)


@dataclass(frozen=True)
class FoundWeights:
    """A rule that changes weights of the trained part, and the concept's word, by which it is then asked for.

    Attributes:
        precision: of `rounded`, for all weights but biases and norms; "": they are not rounded.
        original, share: a pipeline, and its share in every weight; 0: they are not merged.
        losses: of the word, before and after.
    """

    text: str
    losses: list[float]
    precision: str = ""
    original: str = ""
    share: float = 0.0

    def save(self, path: str | Path) -> None:
        write_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> "FoundWeights":
        with explain_read_errors(path):
            return cls(**read_json(path))

    @contextmanager
    def applied(self, family: Family) -> Iterator[None]:
        """Within the block the model has the changes. Raises ModelLoadError: the original cannot be loaded."""
        weights = dict(family.module.named_parameters())
        if self.precision:
            names = [name for name, weight in weights.items() if weight.dim() > 1]
            with changed_weights(family.module, names, lambda _, weight: rounded(weight, self.precision)):
                yield
            return
        others = dict(get_family(load_pipeline(self.original, None, None, "float32")).module.named_parameters())

        def merge(name: str, weight: Tensor) -> Tensor:
            return weight.lerp(others[name].detach().to(weight), self.share)

        with changed_weights(family.module, weights, merge):
            yield


class NamedTemplates:
    """In the place of a `TemplateEncoder`: the concept's word in templates, whatever vectors are given."""

    def __init__(self, family: Family, templates: Sequence[str], word: str):
        self.family, self.templates = family, [template.replace(PLACE, word) for template in templates]

    def __call__(self, vectors: Tensor, rows: Sequence[int]) -> Batch:
        return to(self.family.embed([self.templates[row] for row in rows]), self.family.device)


def change_weights(
    family: Family,
    latents: Tensor,
    templates: Sequence[str],
    concept_words: Sequence[str],
    settings: AttackSettings,
    **rule: str | float,
) -> FoundWeights:
    """Measure the loss of the concept's word before and after a rule of `FoundWeights` changes the weights.

    Args:
        family, latents, templates, concept_words, settings: see `attack_embedding`; nothing is searched.

    Raises:
        ModelLoadError: as `FoundWeights.applied`.
    """
    word = concept_words[0]
    loss = TargetLoss(family, NamedTemplates(family, templates, word), latents, settings)
    losses = [loss_of(loss, NOTHING)]
    found = FoundWeights(word, losses, **rule)
    with found.applied(family):
        losses.append(loss_of(loss, NOTHING))
    return found


def loss_of(loss: TargetLoss, vectors: Tensor) -> float:
    """The loss of vectors on the fixed set of targets, with the model's weights as they are now."""
    with frozen_model(loss.family):
        return loss.fixed(vectors)
