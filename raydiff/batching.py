"""Which requests share forward passes: those of one model and size, in an order that depends on
nothing but the requests. Pure: no clock, no randomness, memory bounded by the lookahead."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from raydiff.request import BatchKey, RenderBatch, RenderRequest, batch_key

PATIENCE = 4
"""A request that this many lookaheads of later ones have passed goes next, however few join it."""


class Batcher:
    """A window of pending requests from which batches are taken.

    Full batches go first, that of the longest waiting request before the others. Where there is
    none, the window being full of sizes that fill no batch, the largest partial one goes (the
    oldest, once it has waited long); else the oldest, if the caller will not wait (`flush`).

    A batch holds its key's oldest request and those nearest to it in num_inference_steps: rows
    leave the UNet when their steps are done, so equal counts keep a batch full to its end.
    """

    def __init__(self, lookahead: int) -> None:
        self._lookahead = lookahead
        self._buckets: dict[BatchKey, _Bucket] = {}
        self._num_pending = 0
        self._next_arrival = 0
        self._last_return = 0
        self._next_batch_id = 0

    def __len__(self) -> int:
        return self._num_pending

    @property
    def is_full(self) -> bool:
        """Whether as many requests as the lookahead are pending: no more should be added."""
        return self._num_pending >= self._lookahead

    def add(self, request: RenderRequest) -> None:
        """Let a request wait behind those of its key and step count."""
        self._insert(self._next_arrival, request)
        self._next_arrival += 1

    def put_back(self, requests: Sequence[RenderRequest]) -> None:
        """Let requests that were taken before wait again, in front and in this order."""
        for request in reversed(requests):
            self._last_return -= 1
            self._insert(self._last_return, request)

    def take(
        self,
        max_batch_size: int | Callable[[BatchKey], int],
        *,
        prefer_model: str | None = None,
        flush: bool = True,
    ) -> RenderBatch | None:
        """Take the next batch, or None where nothing is pending.

        `prefer_model` is what the asking worker has loaded: its batches go first. Others starve
        no longer than the window takes to fill with them. Without `flush`, None also where rows
        still to come may fill a batch.
        """
        if not self._buckets:
            return None
        sizes = {
            key: max_batch_size if isinstance(max_batch_size, int) else max_batch_size(key)
            for key in self._buckets
        }
        if min(sizes.values()) < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {min(sizes.values())}")
        full = [key for key, bucket in self._buckets.items() if len(bucket) >= sizes[key]]
        if full:
            key = self._oldest(_of_model(full, prefer_model))
        elif self.is_full:
            key = self._fullest(_of_model(list(self._buckets), prefer_model))
        elif flush:
            key = self._oldest(_of_model(list(self._buckets), prefer_model))
        else:
            return None
        return self._pop(key, sizes[key])

    def _insert(self, arrival: int, request: RenderRequest) -> None:
        key = batch_key(request)
        bucket = self._buckets.setdefault(key, _Bucket())
        bucket.insert(arrival, request)
        self._num_pending += 1

    def _oldest(self, keys: list[BatchKey]) -> BatchKey:
        return min(keys, key=lambda key: self._buckets[key].first_arrival)

    def _fullest(self, keys: list[BatchKey]) -> BatchKey:
        oldest = self._oldest(list(self._buckets))
        age = self._next_arrival - self._buckets[oldest].first_arrival
        if age > PATIENCE * self._lookahead:
            return oldest
        return max(keys, key=lambda k: (len(self._buckets[k]), -self._buckets[k].first_arrival))

    def _pop(self, key: BatchKey, size: int) -> RenderBatch:
        bucket = self._buckets[key]
        requests = tuple(bucket.pop(size))
        if not len(bucket):
            del self._buckets[key]
        self._num_pending -= len(requests)
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        return RenderBatch(batch_id=batch_id, key=key, requests=requests)


class _Bucket:
    """Pending requests of one key: a queue in order of arrival for each step count."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[tuple[int, RenderRequest]]] = {}
        self._size = 0
        self.first_arrival = math.inf

    def __len__(self) -> int:
        return self._size

    def insert(self, arrival: int, request: RenderRequest) -> None:
        queue = self._queues.setdefault(request.num_inference_steps, deque())
        if arrival < 0:
            queue.appendleft((arrival, request))
        else:
            queue.append((arrival, request))
        self._size += 1
        self.first_arrival = min(self.first_arrival, arrival)

    def pop(self, size: int) -> Iterator[RenderRequest]:
        """Yield the oldest request and its nearest in steps, `size` at most, as they arrived."""
        anchor = min(self._queues, key=lambda steps: self._queues[steps][0][0])
        taken: list[tuple[int, RenderRequest]] = []
        for steps in sorted(self._queues, key=lambda steps: (abs(steps - anchor), steps)):
            queue = self._queues[steps]
            while queue and len(taken) < size:
                taken.append(queue.popleft())
            if not queue:
                del self._queues[steps]
            if len(taken) == size:
                break
        self._size -= len(taken)
        self.first_arrival = min((q[0][0] for q in self._queues.values()), default=math.inf)
        return (request for _, request in sorted(taken, key=lambda entry: entry[0]))


def _of_model(keys: list[BatchKey], model: str | None) -> list[BatchKey]:
    """Return the keys of the model, or all where it has none."""
    return [key for key in keys if key.model == model] or keys


def padded_size(num_rows: int) -> int:
    """Return the batch size that `num_rows` are padded to: 1, 2, 4, 8, 16, ...

    Few sizes per shape let compiled graphs be reused, and a row meets the same kernels whatever
    its neighbours.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, not {num_rows}")
    return 1 << (num_rows - 1).bit_length()
