"""Distances between the pictures of pipelines, and from real images: FID, KID, precision and recall."""

from collections.abc import Mapping

import torch

from sa_diffusers.evaluation.images.image_metrics import FeatureSet, MetricSettings, compute_features, image_metrics
from sa_diffusers.evaluation.images.image_sets import ImageSet
from sa_diffusers.evaluation.suite.inputs import EvaluationInputs
from sa_diffusers.evaluation.suite.judging import Pictures
from sa_diffusers.evaluation.suite.numbers import Measurement
from sa_diffusers.evaluation.suite.options import DISTRIBUTION, PipelineEvaluationConfig


def distances(
    config: PipelineEvaluationConfig, inputs: EvaluationInputs, pictures: Mapping[str, Pictures]
) -> dict[str, list[Measurement]]:
    """fid, kid and prc of the kept sets' pictures, against the reference's own and against the user's folder.

    No interval stands with them: a resampled set has its pictures several times, which moves the FID away from what
    it is of as many different ones, and the neighbours of precision and recall to distance 0.
    """
    metrics = [name for name in config.metric_names if name in DISTRIBUTION]
    if inputs.extractor is None:
        return {}
    settings = MetricSettings(seed=config.seed)

    def features(image_set: ImageSet) -> FeatureSet:
        return compute_features(inputs.extractor, image_set, config.batch_size)

    drawn = {name: _together(name, [features(own[group]) for group in inputs.kept]) for name, own in pictures.items()}
    first = next(iter(drawn))
    against = {f"distance to {first}": drawn[first]} | (
        {} if inputs.real is None else {"distance to real": features(inputs.real)}
    )
    found: dict[str, list[Measurement]] = {name: [] for name in drawn}
    for group, real in against.items():
        for name, generated in drawn.items():
            if real is not generated:
                numbers = image_metrics(
                    real=real, generated=generated, metrics=metrics, extractor=inputs.extractor, settings=settings
                )
                found[name] += _flat(group, numbers, len(generated.features))
    return found


def _together(name: str, parts: list[FeatureSet]) -> FeatureSet:
    return FeatureSet(name, torch.cat([part.features for part in parts]), None)


def _flat(group: str, numbers: Mapping, num_images: int) -> list[Measurement]:
    """The numbers of `image_metrics`, one by one."""
    found = []
    for name, value in numbers.items():
        if name == "prc":
            shares = {key: value[key] for key in ("precision", "recall", "density", "coverage")}
            found += [Measurement(group, key, share, None, num_images) for key, share in shares.items()]
        else:
            number = value["mean"] if isinstance(value, Mapping) else value
            found.append(Measurement(group, name, number, None, num_images))
    return found
