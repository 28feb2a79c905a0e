"""What whole runs cost, from what one unit of each stage does: extrapolated, never run."""

from collections.abc import Mapping
from dataclasses import dataclass

from sa_diffusers.runs.options import ForgetConfig


@dataclass(frozen=True)
class Job:
    """How much of everything a run does.

    Attributes:
        images: drawn for replay, Fisher and surrogate.
        sampler_steps: of each; two UNet passes each, for guidance.
        fisher_evaluations: gradients of one sample at one timestep.
        train_steps, samples_per_step: surrogate and replay samples together.
        evaluation_images: drawn and decoded, by both models together.
    """

    name: str
    images: int
    sampler_steps: int
    fisher_evaluations: int
    train_steps: int
    samples_per_step: int
    evaluation_images: int = 0


@dataclass(frozen=True)
class Costs:
    """Seconds of one unit: a sampler's step of one image, a Fisher evaluation, a sample in a training step."""

    image_step: float
    fisher_evaluation: float
    training_sample: float
    decoded_image: float = 0.0


# Their configurations and README: 5,000 replay and 1,000 surrogate pictures; every timestep of 5,000 samples; 200
# epochs of 1,000 pairs in steps of 4 + 4 a GPU, here counted as steps of one GPU.
AUTHORS = Job("the authors' settings", 6_000, 50, 5_000 * 1_000, 200 * 1_000 // 4, 8)

# A run at the size that Stable Diffusion 1.4 asks for, with nothing at hand, and with the samples and the Fisher of
# the model shared by all concepts. Pictures: 5,000 for replay, and a tenth of them anew without the concept (those of
# the empty prompt); 400 of the surrogate; the evaluation's 200 prompts before and after.
FROM_NOTHING = Job("nothing cached", 5_000 + 500 + 400, 20, 20_000, 1_000, 8, 400)
SHARED = Job("samples and Fisher shared", 500 + 400, 20, 0, 1_000, 8, 400)


def job_of(config: ForgetConfig, name: str, num_terms: int = 1000) -> Job:
    """The run of a configuration, without its evaluation; where no siblings are known, the empty prompt's samples are
    drawn anew without the concept."""
    config = config.resolved()
    redrawn = {"none": 0.0, "open": config.empty_prompt_fraction, "all": 1.0}[config.replay_negative]
    terms = num_terms if config.terms is None else 2 * config.terms
    return Job(
        name,
        round(config.num_samples * (1 + redrawn)) + config.num_surrogate_samples,
        config.num_inference_steps,
        config.fisher_samples * terms if config.ewc_lambda else 0,
        config.num_train_steps,
        2 * config.train_batch_size,
    )


def extrapolate(job: Job, costs: Costs) -> dict[str, float]:
    """Seconds of each stage of a job and their total."""
    evaluation = job.evaluation_images * (job.sampler_steps * costs.image_step + costs.decoded_image)
    stages = {
        "sampling": job.images * job.sampler_steps * costs.image_step,
        "Fisher": job.fisher_evaluations * costs.fisher_evaluation,
        "training": job.train_steps * job.samples_per_step * costs.training_sample,
        "evaluation": evaluation,
    }
    return stages | {"total": sum(stages.values())}


def measured_costs(rows: list[Mapping], sampling: tuple[str, int], fisher: str, step: tuple[str, int]) -> Costs:
    """Costs from rows of `timing.measure`.

    Args:
        sampling: name of the way, and its sampler's steps.
        fisher: name of the way.
        step: name of the way, and samples in one of its steps.
    """
    seconds = {(row["stage"], row["way"]): row["seconds"] for row in rows}
    return Costs(
        seconds["sampling", sampling[0]] / sampling[1],
        seconds["Fisher", fisher],
        seconds["training step", step[0]] / step[1],
    )
