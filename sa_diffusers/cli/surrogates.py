"""Which surrogate costs least? Order candidates by how far the model's predictions for them are from the concept's.

    sa-diffusers surrogates --config bundled/digits --samples runs/digits-seven/samples

The nearer the surrogate, the less of the model has to change. Prints for each sibling of the concept the mean squared
difference of the model's predictions on noised samples, nearest first. Takes every option of `sa-diffusers forget`.
"""

import torch
from torch import Tensor

from sa_diffusers.cli.errors import friendly_errors
from sa_diffusers.cli.forget import over_its_family
from sa_diffusers.cli.parse import parse_given
from sa_diffusers.core.batches import to
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import Family
from sa_diffusers.runs.options import ForgetConfig


NUM_SAMPLES = 200


@torch.no_grad()
def predictions(family: Family, samples: SampleSet, prompts: list[str], seed: int) -> Tensor:
    """Predictions [N, C, h, w] for noised samples under other prompts; equal seeds give equal noise and timesteps."""
    parts = []
    for start in range(0, len(samples), 50):
        chosen = samples.latents[start : start + 50]
        batch = family.batch(chosen, list(map(Condition, prompts[start : start + 50])))
        generator = seeded(seed, "distance", start)
        terms = family.loss.sample_terms(len(chosen), generator)
        noise, device = family.loss.sample_noise(batch, generator), family.device
        batch = to(batch, device)
        parts.append(family.loss.predict(family.module, batch, terms.to(device), noise.to(device)).float().cpu())
    return torch.cat(parts)


def main(argv: list[str] | None = None) -> None:
    given = parse_given(ForgetConfig, argv, description=__doc__)
    with friendly_errors(argv):
        from pathlib import Path

        from sa_diffusers.data.replay import concept_captions
        from sa_diffusers.families import get_family
        from sa_diffusers.io.loading import load_pipeline, pipeline_hashes
        from sa_diffusers.io.processes import progress_bar, say
        from sa_diffusers.io.stages import Artifact
        from sa_diffusers.runs.context import RunContext
        from sa_diffusers.runs.inputs import read_inputs
        from sa_diffusers.runs.stages.samples import SamplesStage

        config = over_its_family(given)
        if not config.samples:
            raise ValueError("expected --samples, the samples/ folder of a run of this model")
        inputs = read_inputs(config)
        concept, *others = inputs.concepts
        if others:
            raise ValueError(f"candidates are ordered for one concept; expected one --concept, got {len(others) + 1}")
        if not concept.siblings:
            raise ValueError(f"no siblings of {concept.name!r} are known; name candidates with --siblings")
        pipeline = load_pipeline(config.model, config.revision, config.variant, config.dtype)
        family = get_family(pipeline, sampler=config.sampler)
        context = RunContext(config.resolved(), inputs, family, Path(config.samples))
        context.artifacts["model"] = Artifact(pipeline, pipeline_hashes(pipeline, family.component))
        family.module.to(torch.float32)  # as in a run
        samples = SamplesStage().given(context).value
        samples = samples.take(range(min(NUM_SAMPLES, len(samples))))
        asked = concept_captions(inputs.templates, inputs.concepts, len(samples), config.seed)
        reference = predictions(family, samples, [caption for caption, *_ in asked], config.seed)
        distances = {}
        for sibling in progress_bar(concept.siblings, "siblings", "words"):
            prompts = [template.replace("{}", sibling) for _, template, _ in asked]
            drawn = predictions(family, samples, prompts, config.seed)
            distances[sibling] = (drawn - reference).square().mean().item()
        say(f"distance from {concept.name!r} (of phrasings {concept.said}):")
        for sibling, distance in sorted(distances.items(), key=lambda pair: pair[1]):
            say(f"  {distance:.5f}  {sibling}")
