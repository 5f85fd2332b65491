"""LMS: linear multistep in sigma, the last four derivatives integrated exactly (k-diffusion)."""

import numpy as np

from raydiff.diffusion.samplers.euler import start_in_sigma
from raydiff.diffusion.samplers.prediction import derivative
from raydiff.diffusion.schedule import FloatArray, Schedule, sigma_steps
from raydiff.diffusion.trajectory import Evaluation, Trajectory

ORDER = 4


def lms(schedule: Schedule, num_steps: int, first_step: int | None, eta: float = 0.0) -> Trajectory:
    """h0, h1, h2 keep the three derivatives before this one, newest first.

    As the reference: in img2img the order counts the steps left out too, and the derivatives that
    they would have given are zero.
    """
    timesteps, sigmas = sigma_steps(schedule, num_steps)
    evaluations = []
    for i in range(first_step or 0, num_steps):
        weights = _weights(sigmas, i, min(i + 1, ORDER))
        derivatives = dict(zip(("d", "h0", "h1", "h2"), weights, strict=False))
        evaluations.append(
            Evaluation(
                timestep=timesteps[i],
                input_scale=1 / np.sqrt(sigmas[i] ** 2 + 1),
                prediction=derivative(schedule.prediction_type, sigmas[i]),
                update={
                    "x": {"x": 1.0, **derivatives},
                    "h0": {"d": 1.0},
                    "h1": {"h0": 1.0},
                    "h2": {"h1": 1.0},
                },
            )
        )
    return start_in_sigma(schedule, sigmas, first_step, evaluations)


def _weights(sigmas: FloatArray, i: int, order: int) -> list[float]:
    """Integrate each Lagrange polynomial through the last `order` sigmas over step i."""
    known = sigmas[i - order + 1 : i + 1][::-1]
    middle, half = (sigmas[i + 1] + sigmas[i]) / 2, (sigmas[i + 1] - sigmas[i]) / 2
    # Gauss-Legendre with two points is exact for the cubics that four derivatives give.
    points = middle + half * np.array([-1.0, 1.0]) / np.sqrt(3)
    weights = []
    for k in range(order):
        others = np.delete(known, k)
        factors = (points[:, None] - others) / (known[k] - others)
        weights.append(float(half * factors.prod(axis=1).sum()))
    return weights
