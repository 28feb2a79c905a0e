"""What the batches of Selective Amnesia cost before its first step."""

import torch
from cheap_runs import context_of

from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.families import get_family
from sa_diffusers.io.stages import Artifact


def test_training_encodes_the_prompts_that_its_steps_show_once_and_no_others(tiny_pipeline, tmp_path):
    family = get_family(tiny_pipeline())
    context = context_of(family, tmp_path, num_train_steps=2, train_batch_size=2)
    context.inputs.prompts.extend(f"a red six {i}" for i in range(200))
    for name in ("surrogate", "replay_samples"):
        samples = SampleSet(torch.zeros(2, *family.latent_shape), [Condition(f"{name} {i}") for i in range(2)])
        context.artifacts[name] = Artifact(samples, None)
    read = []
    family.pipeline.text_encoder.register_forward_hook(lambda _, given, out: read.append(len(out[0])))
    batches = context.method.batches(context)
    assert 0 < sum(read) <= 4  # of 200 prompts those that two steps of two show
    prepared = sum(read)
    for step in range(2):
        batches(step)
    assert sum(read) == prepared + 2  # the surrogate's
