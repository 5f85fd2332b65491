"""PNDM without its Runge-Kutta start (Liu et al. 2022, arXiv 2202.09778): Adams-Bashforth steps
over the last four answers of the model. N + 1 evaluations: the second step is done twice."""

import numpy as np
from numpy.typing import NDArray

from raydiff.diffusion.samplers.ddim import alpha_at, start_in_alpha
from raydiff.diffusion.samplers.prediction import predicted_noise
from raydiff.diffusion.schedule import Schedule, alphas_cumprod, whole_timesteps
from raydiff.diffusion.trajectory import Evaluation, Trajectory, Update

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the newest and earlier answers, by how many there are."""


def pndm(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """h0, h1, h2 keep the earlier answers, newest first; h3 the x that the run started from."""
    timesteps = _timesteps(schedule, num_steps)
    stride = schedule.num_train_timesteps // num_steps
    evaluations = []
    for count, timestep in enumerate(timesteps[first_step or 0 :]):
        if count == 1:
            # The first step again, now with the mean of the answers at both of its ends.
            update = _repeat_first_step(schedule, timestep + stride, timestep)
        else:
            update = _multistep(schedule, timestep, timestep - stride, max(count - 1, 0))
        evaluations.append(Evaluation(timestep=timestep, update=update))
    return start_in_alpha(alphas_cumprod(schedule), timesteps, first_step, evaluations)


def _timesteps(schedule: Schedule, num_steps: int) -> NDArray[np.int64]:
    timesteps = whole_timesteps(schedule, num_steps)
    return np.concatenate([timesteps[:2], timesteps[1:2], timesteps[2:]])


def _multistep(schedule: Schedule, timestep: int, next_timestep: int, num_earlier: int) -> Update:
    answers = ("m", "h0", "h1", "h2")
    weights = ADAMS_BASHFORTH[min(num_earlier, 3)]
    mean = dict(zip(answers, weights, strict=False))
    update: dict[str, dict[str, float]] = {
        "x": _step(schedule, timestep, next_timestep, "x", mean),
        "h0": {"m": 1.0},
        "h1": {"h0": 1.0},
        "h2": {"h1": 1.0},
    }
    if num_earlier == 0:
        update["h3"] = {"x": 1.0}
    return update


def _repeat_first_step(schedule: Schedule, timestep: int, next_timestep: int) -> Update:
    return {"x": _step(schedule, timestep, next_timestep, "h3", {"m": 1 / 2, "h0": 1 / 2})}


def _step(
    schedule: Schedule, timestep: int, next_timestep: int, start: str, answer: dict[str, float]
) -> dict[str, float]:
    """Return the weights of equation 9: from `start` at one timestep to the next."""
    alpha, alpha_next = alpha_at(schedule, timestep), alpha_at(schedule, next_timestep)
    scale = alpha * np.sqrt(1 - alpha_next) + np.sqrt(alpha * (1 - alpha) * alpha_next)
    along = (alpha - alpha_next) / scale
    noise_x, noise_m = predicted_noise(schedule.prediction_type, alpha)
    weights = {name: along * noise_m * weight for name, weight in answer.items()}
    weights[start] = np.sqrt(alpha_next / alpha) + along * noise_x
    return weights
