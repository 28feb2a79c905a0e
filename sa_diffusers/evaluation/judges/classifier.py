"""Image classifiers with one head per attribute: they judge what models draw and never help to train them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from sa_diffusers.core.concepts import fold
from sa_diffusers.evaluation.intervals import wilson_interval


class ImageClassifier(ModelMixin, ConfigMixin):
    """A model that names the class of each attribute of an image, by one linear head for each on common features.

    Its configuration holds `attributes`, `words`, `accuracy` and `image_size`, as `AttributeClassifier`'s does.
    Subclasses implement `features`, and end their constructor with `_add_heads`.
    """

    def features(self, images: Tensor) -> Tensor:
        """Activations before the heads: [B, 3, H, W] in [-1, 1] -> [B, num_features].

        Raises:
            ValueError: images of another shape than [B, 3, image_size, image_size].
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B, classes] of every attribute, from images [B, 3, H, W] in [-1, 1]. Raises as `features` does."""
        return self._logits(self.features(images))

    def _add_heads(
        self, attributes: dict[str, list[str]], words: dict[str, dict[str, list[str]]] | None, num_features: int
    ) -> None:
        """Make the heads. Raises ValueError where `words` lacks a class, or has one that `attributes` lacks."""
        expected = {attribute: sorted(classes) for attribute, classes in attributes.items()}
        named = {attribute: sorted(classes) for attribute, classes in (words or attributes).items()}
        if named != expected:
            raise ValueError(f"expected words for the classes {expected}, got words for {named}")
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, len(part)) for name, part in attributes.items()})

    def _logits(self, features: Tensor) -> dict[str, Tensor]:
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def probabilities(self, images: Tensor, batch_size: int = 256) -> dict[str, Tensor]:
        """Class probabilities [N, classes] of every attribute, on the CPU, from images [N, 3, H, W] in [-1, 1].

        Always those of eval mode: in training mode an image's class would depend on dropout and on its batch.

        Raises:
            ValueError: no images, or images of another size.
        """
        logits = self._in_eval_mode(self, images, batch_size)
        names = self.config.attributes
        return {name: torch.cat([part[name].float().softmax(1).cpu() for part in logits]) for name in names}

    @torch.no_grad()
    def features_of(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """`features` [N, num_features] of many images, float32 on the CPU; in eval mode, and raises, as above."""
        return torch.cat([part.float().cpu() for part in self._in_eval_mode(self.features, images, batch_size)])

    def _in_eval_mode(self, compute: Callable[[Tensor], Any], images: Tensor, batch_size: int) -> list:
        if len(images) == 0:
            raise ValueError("expected at least one image, got none")
        training = self.training
        self.eval()
        try:
            return [compute(part.to(self.device, self.dtype)) for part in images.split(batch_size)]
        finally:
            self.train(training)

    def named(self, probabilities: dict[str, Tensor]) -> dict[str, list[str]]:
        """The most probable class of every attribute, by its name, from what `probabilities` returns."""
        classes = self.config.attributes
        return {name: [classes[name][index] for index in p.argmax(1)] for name, p in probabilities.items()}

    def find_class(self, phrasings: Sequence[str]) -> tuple[str, int] | None:
        """The one class that all phrasings are words of, in any case, as (attribute, index); None if there is none."""
        wanted = set(map(fold, phrasings))
        for attribute, classes in self.config.attributes.items():
            for index, name in enumerate(classes):
                words = [name] if self.config.words is None else self.config.words[attribute][name]
                if wanted and wanted <= set(map(fold, words)):
                    return attribute, index
        return None

    def require_class(self, phrasings: Sequence[str]) -> tuple[str, int]:
        """As `find_class`; ValueError, ending in what to do, where there is none."""
        found = self.find_class(phrasings)
        if found is None:
            named = " and ".join(map(repr, phrasings))
            raise ValueError(
                f"the classifier has no class named {named}; it knows {self.config.attributes}. Pass another "
                "--classifier, or none (`classifier: []` in the YAML file of a run)"
            )
        return found

    def require_size(self, resolution: int) -> None:
        """Raise ValueError where it cannot read a model's pictures, of so many pixels a side."""
        if self.config.image_size != resolution:
            raise ValueError(
                f"the classifier reads pictures of {self.config.image_size} pixels, the model draws {resolution}: "
                "pass another --classifier or none"
            )

    def _check_images(self, images: Tensor) -> None:
        """Raise ValueError for images of another shape than [B, 3, image_size, image_size]."""
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"expected images [B, 3, {size}, {size}], got {list(images.shape)}; resize them first")


class AttributeClassifier(ImageClassifier):
    """A convolutional network that names the class of every attribute of an image.

    Args:
        attributes: classes of each attribute, {"digit": ["zero", ...], "ink": [...]}; logits are in their order.
        words: the words by which a prompt may name a class, {"digit": {"seven": ["seven", "7"]}}; None: only its name.
        accuracy: share of held-out real images that were classified right, by attribute; None until measured.
        image_size: height and width of the images in pixels, at least 16.
        channels: width of the convolutions of each stage, multiples of 8; every stage halves the image.
        num_features: width of the layer before the heads.

    Raises:
        ValueError: `words` names an attribute or a class that `attributes` does not have, or lacks one that it has.
    """

    @register_to_config
    def __init__(
        self,
        attributes: dict[str, list[str]],
        words: dict[str, dict[str, list[str]]] | None = None,
        accuracy: dict[str, float] | None = None,
        image_size: int = 32,
        channels: tuple[int, ...] = (32, 64, 96),
        num_features: int = 128,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width in zip((3, *channels), channels, strict=False):
            layers += [nn.Conv2d(width_in, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)  # keeps where things are: a 6 has its loop below, a 9 above
        self.project = nn.Linear(4 * channels[-1], num_features)
        self._add_heads(attributes, words, num_features)

    def features(self, images: Tensor) -> Tensor:
        self._check_images(images)
        return F.silu(self.project(self.pool(self.trunk(images)).flatten(1)))


def entropies(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each distribution [N, classes]: [N]."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(1)


@dataclass(frozen=True)
class Score:
    """How many of `total` images were read as what they should show."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927) for the share: unlike the normal one, it does not collapse at 0 and 1."""
        return wilson_interval(self.share, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.4f} of {self.total} (95 % interval {low:.4f} to {high:.4f})"

    def __add__(self, other: "Score") -> "Score":
        return Score(self.right + other.right, self.total + other.total)

    @classmethod
    def total_of(cls, scores: Iterable["Score"]) -> "Score":
        return sum(scores, cls(0, 0))


def score_images(
    classifier: ImageClassifier, images: Tensor, expected: Sequence[dict[str, str]]
) -> dict[str, dict[str, Score]]:
    """Compare what the classifier reads with what the images should show.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        expected: for each image the class of each attribute; an attribute that is left out is not judged.

    Returns:
        {attribute: {class: Score}}, of what `expected` names at least once.

    Raises:
        ValueError: another number of images than of expectations, or a class that the classifier does not know.
    """
    if len(images) != len(expected):
        raise ValueError(f"expected one description an image, got {len(expected)} for {len(images)} images")
    known = classifier.config.attributes
    for row in expected:
        for attribute, name in row.items():
            if name not in known.get(attribute, []):
                raise ValueError(
                    f"the classifier knows {attribute} as one of {known.get(attribute, [])}, got {name!r}"
                )
    scores: dict[str, dict[str, Score]] = {}
    for attribute, right in rights(classifier.named(classifier.probabilities(images)), expected).items():
        for row, value in zip(expected, right.tolist(), strict=True):
            if attribute in row:
                by_class = scores.setdefault(attribute, {})
                by_class[row[attribute]] = by_class.get(row[attribute], Score(0, 0)) + Score(int(value), 1)
    return scores


def rights(read: Mapping[str, Sequence[str]], labels: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    """Whether each picture shows each attribute as it should: {attribute: float64 [N] of 1, 0, and NaN: not named}.

    Args:
        read: the class of each picture [N] by attribute, as of `ImageClassifier.named`.
        labels: {attribute: class} of each picture.
    """
    return {
        name: torch.tensor([_right(row, name, found) for row, found in zip(labels, classes, strict=True)]).double()
        for name, classes in read.items()
    }


def _right(row: Mapping[str, str], attribute: str, found: str) -> float:
    return float(row[attribute] == found) if attribute in row else math.nan
