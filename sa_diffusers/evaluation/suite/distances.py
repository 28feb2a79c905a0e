"""Distances between the pictures of pipelines, and from real images: FID, KID, precision and recall."""

from collections.abc import Mapping, Sequence

import torch

from sa_diffusers.evaluation.images.metrics import FeatureSet, compute_features, image_metrics
from sa_diffusers.evaluation.images.options import MetricSettings
from sa_diffusers.evaluation.images.sets import ImageSet
from sa_diffusers.evaluation.suite.inputs import EvaluationInputs
from sa_diffusers.evaluation.suite.judging import Pictures
from sa_diffusers.evaluation.suite.numbers import Measurement
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig


SHARES = ("precision", "recall", "density", "coverage")


def distances(
    config: PipelineEvaluationConfig, inputs: EvaluationInputs, pictures: Mapping[str, Pictures]
) -> dict[str, list[Measurement]]:
    """fid, kid and prc of the kept sets' pictures, against the reference's own and against the user's folder.

    No interval stands with them: a resampled set has its pictures several times, which moves the FID away from what
    it is of as many different ones, and the neighbours of precision and recall to distance 0.
    """
    if inputs.extractor is None:
        return {}
    how = {"metrics": config.distribution_metrics, "extractor": inputs.extractor}
    settings = MetricSettings(seed=config.seed)

    def features(name: str, sets: Sequence[ImageSet]) -> FeatureSet:
        parts = [compute_features(inputs.extractor, part, config.batch_size).features for part in sets]
        return FeatureSet(name, torch.cat(parts))

    drawn = {name: features(name, [own[group] for group in inputs.kept]) for name, own in pictures.items()}
    first = next(iter(drawn))
    against = {f"distance to {first}": drawn[first]}
    if inputs.real is not None:
        against["distance to real"] = features(inputs.real.name, [inputs.real])
    found: dict[str, list[Measurement]] = {name: [] for name in drawn}
    for group, real in against.items():
        for name, generated in drawn.items():
            if real is not generated:
                numbers = image_metrics(real=real, generated=generated, settings=settings, **how)
                shares = {key: value for key, value in numbers.pop("prc", {}).items() if key in SHARES}
                means = {key: value["mean"] if isinstance(value, Mapping) else value for key, value in numbers.items()}
                count = len(generated.features)
                found[name] += [Measurement(group, key, value, None, count) for key, value in (means | shares).items()]
    return found
