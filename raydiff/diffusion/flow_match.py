"""Flow-match schedules: sigmas from 1 (noise) to 0 (clean), as diffusers' FlowMatchEulerDiscrete
scheduler has them, and Euler steps along them with rows at different places of different ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from raydiff.errors import ModelError, RowError, nearest

DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
"""What the distilled LTX-2 checkpoints were trained on: 8 steps (Lightricks/LTX-2, ltx-pipelines,
utils/constants.py)."""

REFINE_SIGMAS = DISTILLED_SIGMAS[5:]
"""Of a second stage, at twice the size: 3 steps from partial noise (same source)."""

MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowMatchConfig:
    """A checkpoint's scheduler_config.json; names and defaults are diffusers' own."""

    shift: float = 1.0
    """Of a fixed schedule: how much of it is spent near the noise."""
    use_dynamic_shifting: bool = False
    """Shift by the number of tokens instead, along the line that the next four fields give."""
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    """The last sigma before 0: the schedule is stretched to end there."""
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read scheduler_config.json; raises ModelError for a schedule that cannot be run."""
        names = [field.name for field in fields(cls)]
        for name, value in config.items():
            _check_option(name, value, names)
        known = {name: config[name] for name in names if config.get(name) is not None}
        return cls(**known)

    def sigmas(self, num_inference_steps: int, num_tokens: int) -> tuple[float, ...]:
        """Return the N + 1 sigmas of N steps, for latents of so many tokens; the last is 0.

        Raises RowError for a number of steps that is not 1 to 1000.
        """
        if not 1 <= num_inference_steps <= MAX_STEPS:
            raise RowError(
                f"num_inference_steps is {num_inference_steps}; expected 1 to {MAX_STEPS}"
            )
        # float32 from here on, as the reference: its last bits are the model's input.
        even = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).astype(np.float32)
        odds = 1 / even - 1
        if not self.use_dynamic_shifting:
            shifted = self.shift * even / (1 + (self.shift - 1) * even)
        elif self.time_shift_type == "exponential":
            mu = math.exp(self.mu(num_tokens))
            shifted = mu / (mu + odds)
        else:
            mu = self.mu(num_tokens)
            shifted = mu / (mu + odds)
        # One step has nothing to stretch: its only sigma is 1.
        if self.shift_terminal and num_inference_steps > 1:
            distance = 1 - shifted
            shifted = 1 - distance / (distance[-1] / (1 - self.shift_terminal))
        return (*shifted.astype(np.float32).tolist(), 0.0)

    def mu(self, num_tokens: int) -> float:
        """Return the dynamic shift of so many tokens: linear, and not bounded by max_shift."""
        per_token = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return num_tokens * per_token + self.base_shift - per_token * self.base_image_seq_len


class FlowMatchSteps:
    """Rows on their ways from their first sigma to 0: all begin together, each ends on its own.

        while not steps.is_done:
            x0 = ...(steps.sigmas, steps.rows)
            x = steps.euler(x, x0)
            steps.advance()

    Tensors of a step have one line for each active row, in the order of `rows`.
    """

    def __init__(self, schedules: Sequence[Sequence[float]], device: torch.device) -> None:
        """`schedules` has each row's falling sigmas, the last of them 0."""
        self._num_steps = [len(schedule) - 1 for schedule in schedules]
        table = torch.zeros(len(schedules), max(self._num_steps) + 1)
        for row, schedule in enumerate(schedules):
            table[row, : len(schedule)] = torch.tensor(schedule, dtype=torch.float32)
        self._table = table.to(device)
        self._step = 0
        self._select()

    @property
    def is_done(self) -> bool:
        """Whether every row has taken its last step."""
        return not self.rows

    @property
    def sigmas(self) -> Tensor:
        """(A,) float32: where the active rows stand."""
        return self._active[:, self._step]

    def euler(self, x: Tensor, x0: Tensor) -> Tensor:
        """Move x (A, ...) straight towards x0, what it would be without noise, by one step."""
        ratio = self._active[:, self._step + 1] / self.sigmas
        return x0 + ratio.view(-1, *[1] * (x.ndim - 1)) * (x - x0)

    def advance(self) -> None:
        """Go on to the next step; rows that have none left are no longer active."""
        self._step += 1
        if any(self._num_steps[row] <= self._step for row in self.rows):
            self._select()

    def _select(self) -> None:
        self.rows = tuple(
            row for row, num_steps in enumerate(self._num_steps) if num_steps > self._step
        )
        self.row_index = torch.tensor(self.rows, dtype=torch.int64, device=self._table.device)
        self._active = self._table.index_select(0, self.row_index)


def add_noise(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return clean latents as they stand at `sigma`."""
    return sigma * noise + (1 - sigma) * latents


_MUST_BE_OFF = (
    "invert_sigmas",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
"""Options that would change the outcome and that nothing here implements."""

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("FlowMatchEulerDiscreteScheduler",),
    "time_shift_type": ("exponential", "linear"),
    "num_train_timesteps": (1000,),
}


def _check_option(name: str, value: Any, names: Sequence[str]) -> None:
    if name in _MUST_BE_OFF:
        if value:
            raise _error(name, value, "it is not supported; it must be off or absent")
    elif name in _ACCEPTED:
        if value not in _ACCEPTED[name]:
            raise _error(name, value, f"expected {' or '.join(map(str, _ACCEPTED[name]))}")
    elif name not in names:
        if not name.startswith("_"):
            known = [*names, *_MUST_BE_OFF, *_ACCEPTED]
            raise _error(name, value, f"it is not an option. {nearest(name, known)}".strip())
    elif name == "use_dynamic_shifting":
        if not isinstance(value, bool | None):
            raise _error(name, value, "expected true or false")
    elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise _error(name, value, "expected a number")
    elif name == "shift_terminal" and value is not None and not 0 <= value < 1:
        raise _error(name, value, "expected a number from 0 up to 1, or null")


def _error(name: str, value: object, rule: str) -> ModelError:
    return ModelError(f"scheduler_config.json: {name} is {value!r}: {rule}")
