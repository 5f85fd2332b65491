"""How long a batch may take, by how long others of its kind have taken in this run."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

MIN_TIMEOUT_S = 120.0
"""auto never asks for less: a slow disk or a busy node is no reason to kill a worker."""
TOLERANCE = 10.0
"""auto allows this many times the longest time seen."""


@dataclass(slots=True)
class _Longest:
    row_s: float = 0.0
    step_s: float = 0.0


class RowTimes:
    """The longest times per row, and per denoising step of a row, of each kind of batch."""

    def __init__(self, row_timeout_s: float | Literal["auto"], first_timeout_s: float) -> None:
        """`first_timeout_s` is for a kind of which none has ended: kernels may be compiled."""
        self._row_timeout_s = row_timeout_s
        self._first_timeout_s = first_timeout_s
        self._longest: dict[Hashable, _Longest] = {}

    @property
    def shortest_s(self) -> float:
        """A time that every batch has, so that most need no reckoning."""
        if self._row_timeout_s != "auto":
            return self._row_timeout_s
        return min(MIN_TIMEOUT_S, self._first_timeout_s)

    def observe(self, kind: Hashable, *, num_rows: int, num_steps: int, elapsed_s: float) -> None:
        """Take in how long a batch took; `num_steps` are those of all its rows together."""
        longest = self._longest.setdefault(kind, _Longest())
        longest.row_s = max(longest.row_s, elapsed_s / num_rows)
        if num_steps:
            longest.step_s = max(longest.step_s, elapsed_s / num_steps)

    def timeout_s(self, kind: Hashable, *, num_rows: int, num_steps: int) -> float:
        """Return how long a batch may take."""
        if self._row_timeout_s != "auto":
            return self._row_timeout_s * num_rows
        longest = self._longest.get(kind)
        if longest is None:
            return self._first_timeout_s
        # Rows of a kind may differ in steps: the greater of both estimates holds for all.
        expected_s = max(longest.row_s * num_rows, longest.step_s * num_steps)
        return max(MIN_TIMEOUT_S, TOLERANCE * expected_s)
