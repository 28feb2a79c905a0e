"""The samplers that a run may choose from, made from a pipeline's own scheduler."""

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin


def make_scheduler(sampler: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """ "dpmsolver++" (multistep, order 2), "ddim" (eta 0), or "pipeline": the scheduler as it is.

    Raises:
        ValueError: another sampler.
    """
    if sampler == "dpmsolver++":
        return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver++")
    if sampler == "ddim":
        # Schedulers that clip nothing do not say so, and DDIM would clip latents to [-1, 1] unless told.
        return DDIMScheduler.from_config(scheduler.config, clip_sample=scheduler.config.get("clip_sample", False))
    if sampler == "pipeline":
        return scheduler
    raise ValueError(f"expected sampler to be one of dpmsolver++, ddim, pipeline, got {sampler!r}")
