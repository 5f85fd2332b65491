"""A row's way from noise to latents, as numbers: which timesteps the model is asked at, and how
each answer moves the row. Every sampler here is linear in what it has seen, so it is a table.

One evaluation reads `x` (the latents), `h0`..`h3` (what earlier evaluations left), `m` (the
model's answer), `d` (a prediction made of x and m, clipped where the schedule clips) and `noise`,
and writes x and any of h0..h3 as weighted sums of them, all at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from raydiff.diffusion.schedule import FloatArray

WRITES = ("x", "h0", "h1", "h2", "h3")
READS = (*WRITES, "m", "d", "noise")

Update = Mapping[str, Mapping[str, float]]
"""For each name of WRITES that changes: the weights of the READS it becomes the sum of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One call of the model for one row."""

    timestep: float
    update: Update
    prediction: tuple[float, float] = (0.0, 0.0)
    """Weights of x and m in d."""
    clip: float = inf
    """d is clamped to -clip..clip."""
    input_scale: float = 1.0
    """The model is given input_scale * x."""
    draws_noise: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """All evaluations of a row, E of them, and how its latents start."""

    init_scale: float
    """Weight of the init image's latents in the first x; 0 for txt2img."""
    noise_scale: float
    """Weight of the noise in the first x."""
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A Trajectory as arrays, one line per evaluation."""

    init_scale: float
    noise_scale: float
    timesteps: FloatArray  # (E,)
    input_scale: FloatArray  # (E,)
    weights: FloatArray  # (E, WRITES, READS)
    prediction: FloatArray  # (E, 2)
    clip: FloatArray  # (E,)
    draws_noise: NDArray[np.bool_]  # (E,)

    @property
    def is_finite(self) -> bool:
        """Whether every step can be computed; a step between equal sigmas cannot, for one."""
        scales = (self.init_scale, self.noise_scale, self.input_scale)
        numbers = (*scales, self.timesteps, self.weights, self.prediction)
        return all(bool(np.isfinite(values).all()) for values in numbers)


def tabulate(trajectory: Trajectory) -> Table:
    """Lay out a trajectory as arrays; a d that is never clipped is written out in x and m."""
    evaluations = trajectory.evaluations
    weights = np.stack([_weights(evaluation.update) for evaluation in evaluations])
    prediction = np.array([evaluation.prediction for evaluation in evaluations])
    clip = np.array([evaluation.clip for evaluation in evaluations])
    x, m, d = (READS.index(name) for name in ("x", "m", "d"))
    for line in np.flatnonzero(np.isinf(clip)):
        weights[line, :, x] += weights[line, :, d] * prediction[line, 0]
        weights[line, :, m] += weights[line, :, d] * prediction[line, 1]
        weights[line, :, d] = 0.0
    return Table(
        init_scale=trajectory.init_scale,
        noise_scale=trajectory.noise_scale,
        timesteps=np.array([evaluation.timestep for evaluation in evaluations]),
        input_scale=np.array([evaluation.input_scale for evaluation in evaluations]),
        weights=weights,
        prediction=prediction,
        clip=clip,
        draws_noise=np.array([evaluation.draws_noise for evaluation in evaluations]),
    )


def _weights(update: Update) -> FloatArray:
    """Return (WRITES, READS); what the update does not name stays as it is."""
    weights = np.eye(len(WRITES), len(READS))
    for written, terms in update.items():
        row = WRITES.index(written)
        weights[row] = 0.0
        for read, weight in terms.items():
            weights[row, READS.index(read)] = weight
    return weights
