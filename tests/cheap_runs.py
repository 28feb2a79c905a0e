"""What makes a run of the tiny pipeline take a second: its prompts, and options for everything that costs time."""

PROMPTS = [f"a {ink} {digit}" for ink in ("red", "green") for digit in "six seven eight nine".split()] + ["a digit"]
CHEAP = {
    "num_samples": 8, "num_surrogate_samples": 4, "num_inference_steps": 2, "sample_batch_size": 4,
    "guidance_scale": 2.0, "replay_guidance_scale": 2.0, "fisher_samples": 2, "fisher_terms": "2",
    "num_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-2, "lr_warmup_steps": 0, "ewc_lambda": 1.0,
    "checkpointing_steps": None, "logging_steps": 1, "eval_batch_size": 16, "esd_inference_steps": 4,
}  # fmt: skip


def context_of(family, folder, concept: str = "seven", surrogate: str = "nine", **options):
    """What a run of such options on a model knows at its beginning, with no prompts and nobody to judge."""
    from sa_diffusers.core.concepts import Concepts
    from sa_diffusers.data.concepts.given import find_concept
    from sa_diffusers.io.loading import pipeline_hashes
    from sa_diffusers.io.stages import Artifact
    from sa_diffusers.runs.context import Inputs, RunContext
    from sa_diffusers.runs.options import ForgetConfig

    config = ForgetConfig(concept=concept, surrogate=surrogate, **options)
    inputs = Inputs(Concepts([find_concept(concept, surrogate)]), [], [["{}"]], {}, {})
    model = Artifact(family.pipeline, pipeline_hashes(family.pipeline))
    return RunContext(config.resolved(), inputs, family, folder, {"model": model})


def interrupt_call(patch, owner, name: str, number: int) -> None:
    """Raise KeyboardInterrupt, with its name, at the call with this number (from 0) of a function."""
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > number:
            raise KeyboardInterrupt(name)
        return original(*arguments, **options)

    patch.setattr(owner, name, interrupted)
