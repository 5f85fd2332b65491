"""Rows that are rendered and lie in a worker's open shard: when it is to be closed, and what
becomes of them when the worker dies first."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from raydiff.engine.places import Slot
from raydiff.request import RenderRequest

MAX_SHARDS_LOST = 10
"""Times that a row may be lost with an open shard before it fails."""
EARLY_FLUSH = 2
"""A row that was lost with so many shards is published as soon as it is rendered again."""
FLUSH_TIMEOUT_S = 600.0
"""Longest time that closing a shard may take: a store that is away comes back, or does not."""


class LostRow(NamedTuple):
    """A row that was lost too often."""

    request: RenderRequest
    error: str


class OpenShards:
    """Counts how often rows were lost, so that each one ends however often workers die."""

    def __init__(self, shard_s: float = math.inf) -> None:
        """`shard_s` is the longest time that a row waits for its shard to be closed."""
        self._shard_s = shard_s
        self._num_lost: Counter[str] = Counter()
        """By request_id, of rows that have not ended."""

    def lost(
        self, requests: Sequence[RenderRequest], reason: str
    ) -> tuple[list[RenderRequest], list[LostRow]]:
        """Note lost rows; return those to render again, and those that were lost too often."""
        self._num_lost.update(request.request_id for request in requests)
        again = [
            request for request in requests if self._num_lost[request.request_id] < MAX_SHARDS_LOST
        ]
        error = (
            f"it was rendered {MAX_SHARDS_LOST} times and lost each time with its worker's open "
            f"shard; the last: {reason}"
        )
        failed = [
            LostRow(request, error)
            for request in requests
            if self._num_lost[request.request_id] >= MAX_SHARDS_LOST
        ]
        return again, failed

    def ended(self, request_id: str) -> None:
        """Forget a row that has ended."""
        self._num_lost.pop(request_id, None)

    def is_due(self, slot: Slot, now: float) -> bool:
        """Whether a worker's open shard must be closed, though more rows may come."""
        if slot.leaving is not None:
            return True
        oldest = next(iter(slot.unpublished.values()))
        if now >= oldest.since + self._shard_s:
            return True
        return any(
            num_lost >= EARLY_FLUSH and request_id in slot.unpublished
            for request_id, num_lost in self._num_lost.items()
        )


def lateness(slot: Slot, now: float) -> str | None:
    """Say how long a worker has been closing its shard, if that is far too long."""
    if slot.flushing is None or now < slot.flush_since + FLUSH_TIMEOUT_S:
        return None
    return f"it has not closed its shard in {FLUSH_TIMEOUT_S:g} s"
