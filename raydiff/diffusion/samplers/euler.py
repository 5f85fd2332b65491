"""Euler and Euler ancestral: steps along the derivative in sigma (k-diffusion)."""

import numpy as np

from raydiff.diffusion.samplers.prediction import derivative
from raydiff.diffusion.schedule import FloatArray, Schedule, sigma_steps
from raydiff.diffusion.trajectory import Evaluation, Trajectory


def euler(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """Each step: x + (sigma_next - sigma) * dx/dsigma."""
    timesteps, sigmas = sigma_steps(schedule, num_steps)
    evaluations = [
        Evaluation(
            timestep=timesteps[i],
            input_scale=1 / np.sqrt(sigmas[i] ** 2 + 1),
            prediction=derivative(schedule.prediction_type, sigmas[i]),
            update={"x": {"x": 1.0, "d": sigmas[i + 1] - sigmas[i]}},
        )
        for i in range(first_step or 0, num_steps)
    ]
    return start_in_sigma(schedule, sigmas, first_step, evaluations)


def euler_ancestral(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """Each step goes down past sigma_next and comes back up to it with fresh noise."""
    timesteps, sigmas = sigma_steps(schedule, num_steps)
    evaluations = []
    for i in range(first_step or 0, num_steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        sigma_up = np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        sigma_down = sigma_next**2 / sigma
        evaluations.append(
            Evaluation(
                timestep=timesteps[i],
                input_scale=1 / np.sqrt(sigma**2 + 1),
                prediction=derivative(schedule.prediction_type, sigma),
                update={"x": {"x": 1.0, "d": sigma_down - sigma, "noise": sigma_up}},
                draws_noise=sigma_next > 0,
            )
        )
    return start_in_sigma(schedule, sigmas, first_step, evaluations)


def start_in_sigma(
    schedule: Schedule,
    sigmas: FloatArray,
    first_step: int | None,
    evaluations: list[Evaluation],
) -> Trajectory:
    """Start where x = x0 + sigma * noise; from an init image when there is a `first_step`."""
    if first_step is not None:
        init_scale, noise_scale = 1.0, sigmas[first_step]
    elif schedule.timestep_spacing == "leading":
        init_scale, noise_scale = 0.0, np.sqrt(sigmas.max() ** 2 + 1)
    else:
        init_scale, noise_scale = 0.0, sigmas.max()
    return Trajectory(
        init_scale=init_scale, noise_scale=noise_scale, evaluations=tuple(evaluations)
    )
