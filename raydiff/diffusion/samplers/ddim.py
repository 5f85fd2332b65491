"""DDIM (Song et al. 2020, arXiv 2010.02502); eta > 0 adds noise back at every step."""

from math import inf
from typing import cast

import numpy as np
from numpy.typing import NDArray

from raydiff.diffusion.samplers.prediction import denoised, predicted_noise
from raydiff.diffusion.schedule import FloatArray, Schedule, alphas_cumprod, whole_timesteps
from raydiff.diffusion.trajectory import Evaluation, Trajectory


def ddim(schedule: Schedule, num_steps: int, first_step: int | None, *, eta: float) -> Trajectory:
    """Each step: sqrt(alpha_next) * x0 + direction * noise predicted + std * fresh noise."""
    timesteps = whole_timesteps(schedule, num_steps)
    alphas = alphas_cumprod(schedule)
    evaluations = []
    for timestep in timesteps[first_step or 0 :]:
        alpha = alphas[timestep]
        # The reference steps back by the same stride whatever the spacing.
        alpha_next = alpha_at(schedule, timestep - schedule.num_train_timesteps // num_steps)
        variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
        std = eta * np.sqrt(variance)
        direction = np.sqrt(1 - alpha_next - std**2)
        noise_x, noise_m = predicted_noise(schedule.prediction_type, alpha)
        evaluations.append(
            Evaluation(
                timestep=timestep,
                prediction=denoised(schedule.prediction_type, alpha),
                clip=schedule.clip_sample_range if schedule.clip_sample else inf,
                update={
                    "x": {
                        "d": np.sqrt(alpha_next),
                        "x": direction * noise_x,
                        "m": direction * noise_m,
                        "noise": std,
                    }
                },
                draws_noise=eta > 0,
            )
        )
    return start_in_alpha(alphas, timesteps, first_step, evaluations)


def alpha_at(schedule: Schedule, timestep: int) -> float:
    """Return alphas_cumprod at a timestep, and where a DDIM or PNDM step below 0 ends."""
    if timestep < 0 and schedule.set_alpha_to_one:
        return 1.0
    return cast(float, alphas_cumprod(schedule)[max(timestep, 0)])


def start_in_alpha(
    alphas: FloatArray,
    timesteps: NDArray[np.int64],
    first_step: int | None,
    evaluations: list[Evaluation],
) -> Trajectory:
    """Start where x = sqrt(alpha) * x0 + sqrt(1 - alpha) * noise; from an init image when there is
    a `first_step`."""
    init_scale, noise_scale = 0.0, 1.0
    if first_step is not None:
        alpha = alphas[timesteps[first_step]]
        init_scale, noise_scale = np.sqrt(alpha), np.sqrt(1 - alpha)
    return Trajectory(
        init_scale=init_scale, noise_scale=noise_scale, evaluations=tuple(evaluations)
    )
