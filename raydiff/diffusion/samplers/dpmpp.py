"""DPM-Solver++(2M) and its SDE form (Lu et al. 2022, arXiv 2211.01095): second-order multistep in
half the log of the signal-to-noise ratio, over predictions of x0."""

from typing import cast

import numpy as np

from raydiff.diffusion.samplers.prediction import denoised
from raydiff.diffusion.schedule import FloatArray, Schedule, solver_steps
from raydiff.diffusion.trajectory import Evaluation, Trajectory

FEW_STEPS = 15
"""With fewer steps than this the last is of first order by default (the authors' code)."""


def dpmpp_2m(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """The probability-flow ODE; h0 keeps the x0 predicted one step before."""
    return _multistep(schedule, num_steps, first_step, is_sde=False)


def dpmpp_2m_sde(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """The reverse SDE: each step adds fresh noise."""
    return _multistep(schedule, num_steps, first_step, is_sde=True)


def signal(sigma: float) -> float:
    """Return sqrt(alpha) where sigma is the noise-to-signal ratio."""
    return cast(float, 1 / np.sqrt(sigma**2 + 1))


def log_snr_step(sigma: float, sigma_next: float) -> float:
    """Return the step h in half the log of the signal-to-noise ratio; infinite to sigma 0."""
    return cast(float, np.log(sigma / sigma_next))


def start_in_signal(
    sigmas: FloatArray, first_step: int | None, evaluations: list[Evaluation]
) -> Trajectory:
    """Start where x has unit variance; from an init image when there is a `first_step`."""
    init_scale, noise_scale = 0.0, 1.0
    if first_step is not None:
        init_scale = signal(sigmas[first_step])
        noise_scale = sigmas[first_step] * init_scale
    return Trajectory(
        init_scale=init_scale, noise_scale=noise_scale, evaluations=tuple(evaluations)
    )


def _multistep(
    schedule: Schedule, num_steps: int, first_step: int | None, *, is_sde: bool
) -> Trajectory:
    timesteps, sigmas = solver_steps(schedule, num_steps)
    first = first_step or 0
    evaluations = []
    for i in range(first, num_steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        is_last = i == num_steps - 1
        is_first_order = i == first or (is_last and _ends_in_first_order(schedule, num_steps))
        update = _first_order(sigma, sigma_next, is_sde=is_sde)
        if not is_first_order:
            previous = log_snr_step(sigmas[i - 1], sigma)
            difference = _difference_weight(schedule, sigma, sigma_next, is_sde=is_sde)
            # D1 = (h / previous) * (x0 now - x0 before)
            weight = difference * log_snr_step(sigma, sigma_next) / previous
            update["d"] += weight
            update["h0"] = -weight
        evaluations.append(
            Evaluation(
                timestep=timesteps[i],
                prediction=denoised(schedule.prediction_type, signal(sigma) ** 2),
                update={"x": update, "h0": {"d": 1.0}},
                draws_noise=is_sde and sigma_next > 0,
            )
        )
    return start_in_signal(sigmas, first_step, evaluations)


def _ends_in_first_order(schedule: Schedule, num_steps: int) -> bool:
    is_short = schedule.lower_order_final and num_steps < FEW_STEPS
    return is_short or schedule.euler_at_final or schedule.final_sigmas_type == "zero"


def _first_order(sigma: float, sigma_next: float, *, is_sde: bool) -> dict[str, float]:
    # exp(-h) is sigma_next / sigma, and h itself is not needed.
    ratio = sigma_next / sigma
    alpha_next, scale = signal(sigma_next), ratio * signal(sigma_next) / signal(sigma)
    if not is_sde:
        return {"x": scale, "d": alpha_next * (1 - ratio)}
    return {
        "x": scale * ratio,
        "d": alpha_next * (1 - ratio**2),
        "noise": sigma_next * alpha_next * np.sqrt(1 - ratio**2),
    }


def _difference_weight(
    schedule: Schedule, sigma: float, sigma_next: float, *, is_sde: bool
) -> float:
    """Return the weight of D1, the slope of x0 in h."""
    ratio, h = sigma_next / sigma, log_snr_step(sigma, sigma_next)
    decay, span = (ratio**2, 2 * h) if is_sde else (ratio, h)
    if schedule.solver_type == "heun":
        return signal(sigma_next) * (1 - (1 - decay) / span)
    return signal(sigma_next) * (1 - decay) / 2
