"""Denoising a batch whose rows have different samplers, steps, strengths and seeds.

A row's whole trajectory is a table made on the host beforehand; one evaluation gathers each
active row's line of it and adds up weighted tensors. Nothing waits for the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.diffusion.noise import draw
from raydiff.diffusion.samplers import get_sampler
from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.diffusion.trajectory import READS, WRITES, Table, tabulate
from raydiff.errors import RowError
from raydiff.request import num_denoise_steps

X, M, D, NOISE = (READS.index(name) for name in ("x", "m", "d", "noise"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """How one row is denoised."""

    sampler: str
    num_inference_steps: int
    strength: float | None = None
    """img2img: share of the steps that is run, above 0 and up to 1; None for txt2img."""
    eta: float = 0.0
    """ddim alone: 0 is deterministic, 1 as random as DDPM."""


def check_plan(plan: RowPlan, config: ScheduleConfig) -> None:
    """Raise RowError when a row cannot be denoised as planned on this checkpoint."""
    row_table(plan, config)


@lru_cache(maxsize=128)
def row_table(plan: RowPlan, config: ScheduleConfig) -> Table:
    """Return the table of a row's evaluations."""
    schedule, num_steps = config.for_sampler(plan.sampler), plan.num_inference_steps
    sampler = get_sampler(plan.sampler, schedule, eta=plan.eta)
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        raise RowError(
            f"num_inference_steps is {num_steps}; the checkpoint takes 1 to "
            f"{schedule.num_train_timesteps}"
        )
    first_step = None
    if plan.strength is not None:
        first_step = num_steps - num_denoise_steps(num_steps, plan.strength)
        if first_step == num_steps:
            least = math.ceil(1000 / num_steps) / 1000
            raise RowError(
                f"strength is {plan.strength}; it leaves none of {num_steps} steps. "
                f"Use {least} or more."
            )
    # What a schedule makes impossible shows as a number that is not finite.
    with np.errstate(all="ignore"):
        table = tabulate(sampler(schedule, num_steps, first_step))
    if not table.is_finite:
        raise RowError(
            f"sampler is {plan.sampler!r} with num_inference_steps {num_steps}: the checkpoint's "
            "schedule has a step there that cannot be computed. Use fewer steps or another sampler."
        )
    return table


class DenoiseState:
    """A batch of rows on their way from noise to latents.

        while not state.is_done:
            latents, timesteps, rows = state.model_input()
            state.step(model(latents, timesteps, ...))
        state.latents

    The unit of progress is one evaluation of the model. A row is active until its last one.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        start: Tensor,
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        """`start` is the first x of all rows, (B, C, h, w) float32 on `device`."""
        lengths = np.array([len(table.timesteps) for table in tables], dtype=np.int64)
        self._ends: NDArray[np.int64] = np.cumsum(lengths)
        self._generators = list(generators)
        self._device = device
        # Host side of the tables: what a step has to look at to decide what to compute.
        weights = np.concatenate([table.weights for table in tables])
        clip = np.concatenate([table.clip for table in tables])
        input_scale = np.concatenate([table.input_scale for table in tables])
        self._reads = weights != 0
        self._writes = (weights != np.eye(len(WRITES), len(READS))).any(axis=2)
        self._scales_input = input_scale != 1
        self._draws_noise = np.concatenate([table.draws_noise for table in tables])
        # Device side: what it computes with.
        timesteps = np.concatenate([table.timesteps for table in tables])
        prediction = np.concatenate([table.prediction for table in tables])
        self._weights = _upload(weights, device)  # (E, WRITES, READS)
        self._prediction = _upload(prediction, device)  # (E, 2)
        self._clip = _upload(clip, device)  # (E,)
        self._input_scale = _upload(input_scale, device)  # (E,)
        self._timesteps = _upload(timesteps, device)  # (E,)

        num_kept = 1 + int(np.flatnonzero(self._writes.any(axis=0)).max(initial=0))
        self._kept = [start, *[torch.zeros_like(start) for _ in range(num_kept - 1)]]
        self._rows: tuple[int, ...]
        self._lines: NDArray[np.int64]
        self._row_index: Tensor
        self._line_index: Tensor
        self._set_active(np.arange(len(tables), dtype=np.int64), self._ends - lengths)

    @classmethod
    def start(
        cls,
        plans: Sequence[RowPlan],
        schedule: ScheduleConfig,
        *,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        init_latents: Sequence[Tensor | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> "DenoiseState":
        """Begin with each row's `noise` (B, C, h, w), float32 from its generator.

        `init_latents` has the diffusion-space latents (1, C, h, w) of the rows whose plan has a
        strength. Raises RowError for a plan that this schedule cannot run.
        """
        device = torch.device(device)
        tables = [row_table(plan, schedule) for plan in plans]
        noise_scale = torch.tensor([table.noise_scale for table in tables], dtype=torch.float32)
        start = _per_row(noise_scale) * noise.float()
        for row, (plan, table) in enumerate(zip(plans, tables, strict=True)):
            if plan.strength is not None:
                latents = init_latents[row] if init_latents is not None else None
                if latents is None:
                    raise ValueError(f"row {row} has a strength but no init_latents")
                start[row : row + 1] += table.init_scale * latents.to(start)
        return cls(tables, _to_device(start, device), generators, device)

    @property
    def is_done(self) -> bool:
        """Whether every row has run its last evaluation."""
        return not self._rows

    @property
    def latents(self) -> Tensor:
        """The rows' latents (B, C, h, w) float32, noisy until the row is done."""
        return self._kept[0]

    def model_input(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Return latents (A, C, h, w) and timesteps (A,) float32 of the active rows, and which
        rows they are: the same tuple until a row finishes."""
        latents = self._active(self._kept[0])
        if self._scales_input[self._lines].any():
            latents = latents * _per_row(self._input_scale.index_select(0, self._line_index))
        return latents, self._timesteps.index_select(0, self._line_index), self._rows

    def step(self, noise_pred: Tensor) -> None:
        """Move the active rows by the model's answer (A, C, h, w) to `model_input`, guided."""
        answer = noise_pred.float()
        reads = self._reads[self._lines].any(axis=0)  # (WRITES, READS)
        weights = self._weights.index_select(0, self._line_index)  # (A, WRITES, READS)
        terms = dict(enumerate(self._active(kept) for kept in self._kept))
        terms[M] = answer
        if reads[:, D].any():
            terms[D] = self._clipped_prediction(terms[X], answer)
        if self._draws_noise[self._lines].any():
            terms[NOISE] = self._draw(answer.shape[1:])
        written = np.flatnonzero(self._writes[self._lines].any(axis=0)).tolist()
        # All sums are made before any is kept: each reads what the evaluation began with.
        values = [_weighted_sum(weights[:, i], terms, reads[i]) for i in written]
        for i, value in zip(written, values, strict=True):
            self._keep(i, value)
        self._advance()

    def _clipped_prediction(self, x: Tensor, answer: Tensor) -> Tensor:
        of_x, of_answer = self._prediction.index_select(0, self._line_index).unbind(1)
        limit = _per_row(self._clip.index_select(0, self._line_index))
        return (_per_row(of_x) * x + _per_row(of_answer) * answer).clamp(-limit, limit)

    def _draw(self, shape: torch.Size) -> Tensor:
        """Return fresh noise (A, ...) for the rows that need it now, zeros for the others."""
        noise = torch.zeros((len(self._rows), *shape))
        for position, (row, line) in enumerate(zip(self._rows, self._lines, strict=True)):
            if self._draws_noise[line]:
                noise[position] = draw([self._generators[row]], tuple(shape))[0]
        return _to_device(noise, self._device)

    def _advance(self) -> None:
        lines = self._lines + 1
        remaining = np.flatnonzero(lines < self._ends[list(self._rows)])
        if len(remaining) == len(lines):
            self._lines = lines
            self._line_index = self._line_index + 1
        else:
            self._set_active(np.array(self._rows)[remaining], lines[remaining])

    def _set_active(self, rows: NDArray[np.int64], lines: NDArray[np.int64]) -> None:
        """Note which rows are active, and the line of the tables that each is at."""
        self._rows = tuple(rows.tolist())
        self._lines = lines
        self._row_index = _to_device(torch.from_numpy(rows), self._device)
        self._line_index = _to_device(torch.from_numpy(lines), self._device)

    def _active(self, tensor: Tensor) -> Tensor:
        if len(self._rows) == tensor.shape[0]:
            return tensor
        return tensor.index_select(0, self._row_index)

    def _keep(self, i: int, value: Tensor) -> None:
        if len(self._rows) < self._kept[i].shape[0]:
            value = self._kept[i].index_copy(0, self._row_index, value)
        self._kept[i] = value


def _weighted_sum(weights: Tensor, terms: dict[int, Tensor], used: NDArray[np.bool_]) -> Tensor:
    """Add up the `used` terms (A, ...) in their order, each row with its weights (A, READS).

    A term that a row does not use has weight 0 there, which adds nothing: the row gets what it
    would get in a batch of its own.
    """
    first, *others = np.flatnonzero(used).tolist()
    total = _per_row(weights[:, first]) * terms[first]
    for i in others:
        total = torch.addcmul(total, _per_row(weights[:, i]), terms[i])
    return total


def _per_row(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _upload(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return _to_device(torch.from_numpy(values).float(), device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for what it is doing."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
