"""LCM (Luo et al. 2023, arXiv 2310.04378): each evaluation jumps to the clean latents, then back
to the next timestep's noise level with fresh noise."""

from math import inf

import numpy as np
from numpy.typing import NDArray

from raydiff.diffusion.samplers.ddim import start_in_alpha
from raydiff.diffusion.samplers.prediction import denoised
from raydiff.diffusion.schedule import Schedule, alphas_cumprod
from raydiff.diffusion.trajectory import Evaluation, Trajectory
from raydiff.errors import RowError

SIGMA_DATA = 0.5
"""Of the boundary condition, equation 9 of the paper."""


def lcm(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """The last evaluation keeps the clean latents."""
    timesteps = _timesteps(schedule, num_steps)
    alphas = alphas_cumprod(schedule)
    evaluations = []
    for i in range(first_step or 0, num_steps):
        is_last = i == num_steps - 1
        alpha_next = 1.0 if is_last else alphas[timesteps[i + 1]]
        scaled = timesteps[i] * schedule.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
        signal, noise = np.sqrt(alpha_next), np.sqrt(1 - alpha_next)
        evaluations.append(
            Evaluation(
                timestep=timesteps[i],
                prediction=denoised(schedule.prediction_type, alphas[timesteps[i]]),
                clip=schedule.clip_sample_range if schedule.clip_sample else inf,
                update={"x": {"d": signal * out, "x": signal * skip, "noise": noise}},
                draws_noise=not is_last,
            )
        )
    return start_in_alpha(alphas, timesteps, first_step, evaluations)


def _timesteps(schedule: Schedule, num_steps: int) -> NDArray[np.int64]:
    """Return `num_steps` of the timesteps that the checkpoint was distilled on, evenly."""
    num_distilled = schedule.original_inference_steps
    if num_steps > num_distilled:
        raise RowError(
            f"num_inference_steps is {num_steps}; sampler lcm takes at most {num_distilled}, "
            "the steps that the checkpoint was distilled on. Use fewer, 4 to 8 are usual."
        )
    stride = schedule.num_train_timesteps // num_distilled
    distilled = np.arange(num_distilled, 0, -1) * stride - 1
    chosen = np.floor(np.linspace(0, num_distilled, num_steps, endpoint=False))
    return distilled[chosen.astype(np.int64)]
