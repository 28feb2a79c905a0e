"""Numbers of a digit's rarest and most typical styles, decoded by the model before and after it forgot a digit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from sa_diffusers.data.labelled_images import LabelledImages
from sa_diffusers.evaluation.judges.classifier import ImageClassifier
from sa_diffusers.pipelines import ConditionalVAEPipeline
from studies.mnist.readings import NEARLY_GREY, Models, read_digit
from studies.mnist.study import encode_means


NUM_PICTURES = 10


def mahalanobis(points: Tensor) -> Tensor:
    """Distance of each point from the mean of all, [N], in units of their own covariance, of points [N, D].

    Raises:
        torch.linalg.LinAlgError: no more points than dimensions, or points in a plane of fewer.
    """
    centred = points.double() - points.double().mean(0)
    factor = torch.linalg.cholesky(torch.cov(centred.T))
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).norm(dim=0)


@dataclass(frozen=True)
class Decoded:
    """Real images of a digit, N of them, encoded and decoded.

    Attributes:
        images: of the rarest styles, [NUM_PICTURES, 1, H, W] in [0, 1], the rarest first.
        measures: by name, [N] each: `bce` to the real image in nats a picture; and of what the classifiers read,
            `probability` of the digit and `entropy` in nats, means over them; and `deviation` from grey (0 to .5),
            with `nearly_grey` for 1 where that is below NEARLY_GREY and 0 elsewhere.
    """

    images: Tensor
    measures: dict[str, Tensor]


@dataclass(frozen=True)
class Styles:
    """All images of a digit that training saw, from the most typical to the rarest style.

    Attributes:
        real: the rarest, [NUM_PICTURES, 1, H, W] in [0, 1], the rarest first.
        rarity: Mahalanobis distance of the original encoder's means to their mean, [N].
        before, after: the same codes decoded by each model.
    """

    real: Tensor
    rarity: Tensor
    before: Decoded
    after: Decoded

    def numbers(self) -> dict:
        """Means over the rarest and the most typical, by measure and model; and rank correlations over all images."""
        order = self.rarity.argsort()
        models = {"before": self.before, "after": self.after}
        found: dict = {"images": len(order)}
        for name, chosen in (("rarest", order[-NUM_PICTURES:]), ("typical", order[:NUM_PICTURES])):
            found[name] = {
                measure: {model: float(each.measures[measure][chosen].mean()) for model, each in models.items()}
                for measure in self.before.measures
            }
            found[name]["rarity"] = float(self.rarity[chosen].mean())
        for measure in self.before.measures:
            change = self.after.measures[measure] - self.before.measures[measure]
            found[f"spearman_{measure}"] = spearman(self.rarity, change)
        return found


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two [N]; 0 where one is constant, which has no ranks."""
    if a.unique().numel() == 1 or b.unique().numel() == 1:
        return 0.0
    return float(stats.spearmanr(a.numpy(), b.numpy()).statistic)


def styles_of(models: Models, data: LabelledImages, digit: int, classifiers: Sequence[ImageClassifier]) -> Styles:
    """Encode all images of a digit by the original encoder, rank them, and decode them by both models."""
    indices = (data.labels == digit).nonzero()[:, 0]
    real = data.sample(indices)
    codes = encode_means(models.before, data, indices)
    rarity = mahalanobis(codes)
    rarest = rarity.argsort(descending=True)[:NUM_PICTURES]

    def decode(model: ConditionalVAEPipeline) -> Decoded:
        with torch.no_grad():
            images = model.vae.decode(codes, torch.full((len(codes),), digit))
        readings = read_digit(classifiers, images, digit)
        measures = {
            "bce": F.binary_cross_entropy(images, real, reduction="none").flatten(1).sum(1),
            "probability": readings.probability,
            "entropy": readings.entropy,
            "deviation": readings.deviation,
            "nearly_grey": (readings.deviation < NEARLY_GREY).double(),
        }
        return Decoded(images[rarest], measures)

    return Styles(real[rarest], rarity, decode(models.before), decode(models.after))


@dataclass(frozen=True)
class Comparison:
    """What forgetting cost the rarest and the most typical styles of the digits that were kept, one value a digit.

    Attributes:
        rarest, typical: the cost, means over the digits.
        low, high: 95 % interval of the mean difference (Student's t over the digits, of one base model and one
            forgetting run: other runs are not in it).
        wins: digits whose rarest styles paid more.
    """

    rarest: float
    typical: float
    low: float
    high: float
    wins: int

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "more"
        return "less" if self.high < 0 else "neither more nor less, within the error"


def compare(rarest: Sequence[float], typical: Sequence[float]) -> Comparison:
    """Compare costs of the same two or more digits, pair by pair."""
    pairs = stats.ttest_rel(rarest, typical)
    low, high = pairs.confidence_interval()
    wins = sum(a > b for a, b in zip(rarest, typical, strict=True))
    return Comparison(sum(rarest) / len(rarest), sum(typical) / len(typical), float(low), float(high), wins)
