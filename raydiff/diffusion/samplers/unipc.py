"""UniPC of order 2 (Zhao et al. 2023, arXiv 2302.04867): each answer of the model first corrects
the step that led to it, then predicts the next."""

from typing import cast

import numpy as np

from raydiff.diffusion.samplers.dpmpp import log_snr_step, signal, start_in_signal
from raydiff.diffusion.samplers.prediction import denoised
from raydiff.diffusion.schedule import FloatArray, Schedule, solver_steps
from raydiff.diffusion.trajectory import Evaluation, Trajectory

ORDER = 2

Weights = dict[str, float]


def unipc(schedule: Schedule, num_steps: int, first_step: int | None) -> Trajectory:
    """h0 and h1 keep the two x0 predicted before, newest first; h2 the corrected x of the last
    step. x itself serves as the model's input alone, once the corrector runs."""
    timesteps, sigmas = solver_steps(schedule, num_steps)
    first = first_step or 0
    evaluations = []
    order = 0
    for i in range(first, num_steps):
        corrected = {"x": 1.0} if i == first else _correct(schedule, sigmas, i, order)
        left = num_steps - i if schedule.lower_order_final else ORDER
        order = min(ORDER, left, order + 1)
        evaluations.append(
            Evaluation(
                timestep=timesteps[i],
                prediction=denoised(schedule.prediction_type, signal(sigmas[i]) ** 2),
                update={
                    "x": _predict(schedule, sigmas, i, order, corrected),
                    "h0": {"d": 1.0},
                    "h1": {"h0": 1.0},
                    "h2": corrected,
                },
            )
        )
    return start_in_signal(sigmas, first_step, evaluations)


def _predict(
    schedule: Schedule, sigmas: FloatArray, i: int, order: int, corrected: Weights
) -> Weights:
    """Return the weights of the x at the next sigma, stepping from the corrected x of this one."""
    ratio, alpha_next = sigmas[i + 1] / sigmas[i], signal(sigmas[i + 1])
    scale = ratio * alpha_next / signal(sigmas[i])
    weights = {name: scale * weight for name, weight in corrected.items()}
    weights["d"] = weights.get("d", 0.0) + alpha_next * (1 - ratio)
    if order == ORDER:
        h = log_snr_step(sigmas[i], sigmas[i + 1])
        distance = -log_snr_step(sigmas[i - 1], sigmas[i]) / h
        slope = alpha_next * _b(schedule, h) / (2 * distance)
        weights["d"] += slope
        weights["h0"] = weights.get("h0", 0.0) - slope
    return weights


def _correct(schedule: Schedule, sigmas: FloatArray, i: int, order: int) -> Weights:
    """Return the weights of x at this sigma, now that the model's answer there is known."""
    ratio, alpha = sigmas[i] / sigmas[i - 1], signal(sigmas[i])
    h = log_snr_step(sigmas[i - 1], sigmas[i])
    b = _b(schedule, h)
    weights = {"h2": ratio * alpha / signal(sigmas[i - 1]), "h0": alpha * (1 - ratio)}
    newest = 0.5
    if order == ORDER:
        distance = -log_snr_step(sigmas[i - 2], sigmas[i - 1]) / h
        older, newest = _corrector_weights(h, b, distance)
        slope = alpha * b * older / distance
        weights["h1"] = -slope
        weights["h0"] += slope
    weights["d"] = -alpha * b * newest
    weights["h0"] += alpha * b * newest
    return weights


def _b(schedule: Schedule, h: float) -> float:
    """Return B(h) of the paper's section 3.1: bh1 or bh2."""
    return -h if schedule.solver_type == "bh1" else cast(float, np.expm1(-h))


def _corrector_weights(h: float, b: float, distance: float) -> tuple[float, float]:
    """Solve the paper's equation 9 for order 2: the weights of the older and the newest x0."""
    phi_2 = np.expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    older = (phi_2 / b - 2 * phi_3 / b) / (1 - distance)
    return older, phi_2 / b - older
