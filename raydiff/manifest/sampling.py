"""Which value of each axis a sweep's row has: every combination, axes side by side, or a sample."""

from dataclasses import dataclass
from hashlib import blake2b, shake_128
from math import prod
from typing import Any, Literal

import numpy as np

MAX_PERMUTED = 2**62
"""Up to so many combinations a sample is drawn without replacement; of more, it never repeats one
in practice."""
NUM_ROUNDS = 6

Mode = Literal["cartesian", "zip", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The rows of a sweep as numbers: row index in, one place on each axis out."""

    mode: Mode
    lengths: tuple[int, ...]
    """Of the axes; the last one changes first."""
    num_rows: int
    seed: int = 0

    @property
    def num_combinations(self) -> int:
        return prod(self.lengths)

    def places(self, start: int, stop: int) -> list[Any]:
        """Return for each axis the places of the rows from `start` to `stop` (int64 numpy, or
        Python's whole numbers where int64 does not hold them)."""
        rows = np.arange(start, stop, dtype=np.int64)
        if self.mode == "zip":
            return [rows if length > 1 else np.zeros_like(rows) for length in self.lengths]
        total = self.num_combinations
        if self.mode == "random":
            if total > MAX_PERMUTED:
                rows = np.array([self._drawn(row, total) for row in rows.tolist()], dtype=object)
            else:
                rows = self._permuted(rows, total)
        places = []
        for length in reversed(self.lengths):
            rows, place = rows // length, rows % length
            places.append(place.astype(np.int64) if length <= MAX_PERMUTED else place)
        return places[::-1]

    def _drawn(self, row: int, total: int) -> int:
        num_bytes = total.bit_length() // 8 + 16
        return int.from_bytes(shake_128(f"{self.seed}/{row}".encode()).digest(num_bytes)) % total

    def _permuted(self, rows: Any, total: int) -> Any:
        """Permute 0 .. total - 1; rows beyond go round again, each time in another order."""
        permuted = np.empty_like(rows)
        for turn in range(int(rows[0]) // total, int(rows[-1]) // total + 1):
            is_in_turn = rows // total == turn
            permuted[is_in_turn] = _permute(rows[is_in_turn] % total, total, f"{self.seed}/{turn}")
        return permuted


def _permute(numbers: Any, total: int, key: str) -> Any:
    """Send each of 0 .. total - 1 to another: a Feistel network on the next even number of bits,
    walked until it comes back below `total`. Needs no memory of what it gave before."""
    half = max(1, ((total - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    digest = blake2b(key.encode(), digest_size=8 * NUM_ROUNDS).digest()
    round_keys = np.frombuffer(digest, dtype="<u8")
    found = numbers.astype(np.uint64)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        left, right = found[outside] >> np.uint64(half), found[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        found[outside] = left << np.uint64(half) | right
        outside = found >= np.uint64(total)
    return found.astype(np.int64)


def _mixed(numbers: Any) -> Any:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014); overflow is meant."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)
