"""Heun's second-order method in sigma (Karras et al. 2022, algorithm 1 without churn): an Euler
step, then the mean of the derivatives at both ends. Two evaluations a step but the last."""

from math import inf

import numpy as np

from raydiff.diffusion.samplers.euler import start_in_sigma
from raydiff.diffusion.samplers.prediction import denoised_in_sigma
from raydiff.diffusion.schedule import Schedule, sigma_steps
from raydiff.diffusion.trajectory import Evaluation, Trajectory, Update


def heun(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """h0 keeps the x that the step started from, h1 its derivative."""
    timesteps, sigmas = sigma_steps(schedule, num_steps)

    def evaluate(i: int, update: Update) -> Evaluation:
        return Evaluation(
            timestep=timesteps[i],
            input_scale=1 / np.sqrt(sigmas[i] ** 2 + 1),
            prediction=denoised_in_sigma(schedule.prediction_type, sigmas[i]),
            clip=schedule.clip_sample_range if schedule.clip_sample else inf,
            update=update,
        )

    evaluations = []
    for i in range(first_step or 0, num_steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        step = sigma_next - sigma
        euler_step = {"x": 1 + step / sigma, "d": -step / sigma}
        slope = {"x": 1 / sigma, "d": -1 / sigma}
        evaluations.append(evaluate(i, {"x": euler_step, "h0": {"x": 1.0}, "h1": slope}))
        if i + 1 < num_steps:
            mean = step / 2
            corrected = {"h0": 1.0, "h1": mean, "x": mean / sigma_next, "d": -mean / sigma_next}
            evaluations.append(evaluate(i + 1, {"x": corrected}))
    return start_in_sigma(schedule, sigmas, first_step, evaluations)
