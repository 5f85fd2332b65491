"""Sorted integer keys with integer values, 8 bytes each, that grow by whole batches.

Log-structured: each batch is a sorted run; runs of like size are joined, so that a key is looked
up in a few dozen bytes per thousand keys of the last batches and one large run.
"""

import numpy as np
from numpy.typing import NDArray

from raydiff.output.keys import Keys

Values = NDArray[np.int64]


class SortedIndex:
    """A multimap of uint64 keys to int64 values; with no values given, a set."""

    def __init__(self, keys: Keys | None = None, values: Values | None = None) -> None:
        self._runs: list[tuple[Keys, Values | None]] = []
        if keys is not None and len(keys):
            self.extend(keys, values)

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._runs)

    def __contains__(self, key: int) -> bool:
        wanted = np.uint64(key)
        for keys, _ in self._runs:
            place = keys.searchsorted(wanted)
            if place < len(keys) and keys[place] == wanted:
                return True
        return False

    def contains(self, wanted: Keys) -> NDArray[np.bool_]:
        """Return which of these keys are there."""
        is_there = np.zeros(len(wanted), np.bool_)
        for keys, _ in self._runs:
            places = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
            is_there |= keys[places] == wanted
        return is_there

    def find(self, key: int) -> list[int]:
        """Return the values of `key`, oldest first."""
        wanted = np.uint64(key)
        found: list[int] = []
        for keys, values in self._runs:
            first = int(keys.searchsorted(wanted))
            if values is None or first == len(keys) or keys[first] != wanted:
                continue
            end = int(keys.searchsorted(wanted, side="right"))
            found += values[first:end].tolist()
        return found

    def extend(self, keys: Keys, values: Values | None = None) -> None:
        """Add a batch. Amortised cost is logarithmic in the number of batches."""
        self._runs.append(_sorted(keys, values))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            (older, older_values), (newer, newer_values) = self._runs[-2:]
            joined = None
            if older_values is not None and newer_values is not None:
                joined = np.concatenate([older_values, newer_values])
            self._runs[-2:] = [_sorted(np.concatenate([older, newer]), joined)]


def _sorted(keys: Keys, values: Values | None) -> tuple[Keys, Values | None]:
    """Sort by key, keeping the order of equal keys; linear in time where runs are sorted."""
    if values is None:
        return np.sort(keys, kind="stable"), None
    order = np.argsort(keys, kind="stable")
    return keys[order], values[order]
