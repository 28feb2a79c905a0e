"""The samplers that a run may choose from, made from a pipeline's own scheduler."""

import copy
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)


class EvenFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method in n steps from n of the flow's own noise levels, evenly chosen; diffusers' default ends at the
    least of them, so that the last step is all but lost."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **_: Any
    ) -> None:
        """`sigmas` of a pipeline count, and no more: FLUX's says its own in place of a number."""
        count = num_inference_steps or len(sigmas)
        super().set_timesteps(sigmas=np.linspace(1, 1 / count, count), device=device)


def pixel_schedule(options: Any, beta_schedule: str = "linear", clip_sample: bool = False) -> DDPMScheduler:
    """The noise schedule of a model of pixels that is trained from nothing: beta from 1e-4 to 0.02."""
    return DDPMScheduler(
        num_train_timesteps=options.num_train_timesteps,  # by name: diffusers forgets what is given by position
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=beta_schedule,
        prediction_type=options.prediction_type,
        clip_sample=clip_sample,
    )


def make_scheduler(sampler: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """ "dpmsolver++" (multistep, order 2), "ddim" (eta 0), or "pipeline": the scheduler as it is.

    Of a flow "ddim" is Euler's method at noise levels that training knows: what it shifts by the size of pictures,
    when it draws, is not shifted then.

    Raises:
        ValueError: another sampler; of a flow, one that is neither of the last two.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if sampler == "ddim":
            shift = 1.0 if scheduler.config.use_dynamic_shifting else scheduler.config.shift
            return EvenFlowScheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift=shift)
        if sampler != "pipeline":
            raise ValueError(f"a flow is drawn by the sampler pipeline or ddim, got {sampler!r}")
    if sampler == "dpmsolver++":
        return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver++")
    if sampler == "ddim":
        # Schedulers that clip nothing do not say so, and DDIM would clip latents to [-1, 1] unless told.
        return DDIMScheduler.from_config(scheduler.config, clip_sample=scheduler.config.get("clip_sample", False))
    if sampler == "pipeline":
        return scheduler
    raise ValueError(f"expected sampler to be one of dpmsolver++, ddim, pipeline, got {sampler!r}")


def check_sampler(scheduler: SchedulerMixin, num_inference_steps: int, what: str) -> None:
    """Raise ValueError, about `what`, for a number of steps that a sampler cannot take: found by taking them.

    So it is with more steps than timesteps, and where a step begins at pure noise (`rescale_betas_zero_snr`), of which
    a prediction of the noise says nothing.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # which takes any
        return
    scheduler, advice = copy.deepcopy(scheduler), "pass fewer, or another sampler"
    timesteps = scheduler.config.num_train_timesteps
    if scheduler.config.get("rescale_betas_zero_snr") and scheduler.config.prediction_type == "epsilon":
        advice = "its rescale_betas_zero_snr is for models that predict v; set it to false in scheduler_config.json"
    try:
        scheduler.set_timesteps(num_inference_steps)
        sample = torch.ones(1, 1, 8, 8) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            predicted = torch.ones_like(scheduler.scale_model_input(sample, timestep))
            sample = scheduler.step(predicted, timestep, sample).prev_sample
        wrong = None if torch.isfinite(sample).all() else "values that are not finite"
    except (ValueError, IndexError) as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"{what}: {num_inference_steps} of the model's {timesteps} timesteps give {wrong}; {advice}")
