"""When failing rows are not the rows' fault: a worker whose rows all fail is retired, and a run
of which too many rows fail is stopped."""

from collections import Counter
from collections.abc import Sequence

from raydiff.config import EngineConfig
from raydiff.engine.places import Outcome, Slot
from raydiff.errors import EngineError
from raydiff.request import RenderRequest, RenderResult

MIN_ROWS_ENDED = 200
"""Rows of this session before their share of failures means anything."""
MAX_ERRORS_COUNTED = 1000
"""Distinct error messages; they may name values, and then there are as many as rows."""


class CircuitBreaker:
    """Withholds what fails on a worker until one of its rows succeeds.

    Then the rows are to blame. If none does in `max_worker_failures` failures, the worker is:
    it is retired, and another one tries the rows. A row that fails there too has failed.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._tried: set[str] = set()
        """Requests that failed on a worker which is no more."""
        self._num_ended = 0
        self._num_failed = 0
        self._errors: Counter[str] = Counter()

    def succeeded(self, slot: Slot) -> list[RenderResult]:
        """Note a row that did not fail; return the failures before it, which are final now."""
        slot.num_failures = 0
        released = [withheld.result for withheld in slot.withheld]
        slot.withheld = []
        return released

    def failed(
        self, slot: Slot, failures: Sequence[Outcome], *, num_failures: int | None = None
    ) -> list[RenderResult]:
        """Note failed rows; return those that are final. The worker may have to leave.

        `num_failures` is how often the worker failed, if not once for each of them.
        """
        final = [one.result for one in failures if one.request.request_id in self._tried]
        fresh = [one for one in failures if one.request.request_id not in self._tried]
        slot.withheld += fresh
        if fresh:
            slot.num_failures += len(fresh) if num_failures is None else num_failures
            limit = self._config.max_worker_failures
            if slot.num_failures >= limit:
                slot.leave(
                    "retired",
                    f"{slot.num_failures} failures in a row without a success "
                    f"(engine.max_worker_failures: {limit}); the last: {fresh[-1].result.error}",
                )
        return final

    def take_back(self, slot: Slot) -> list[RenderRequest]:
        """Return the rows withheld on a worker that is gone: another one is to try them."""
        requests = [withheld.request for withheld in slot.withheld]
        self._tried.update(request.request_id for request in requests)
        slot.withheld = []
        return requests

    def ended(self, result: RenderResult) -> None:
        """Count a row that has ended."""
        self._tried.discard(result.request_id)
        self._num_ended += 1
        if result.status == "completed":
            return
        self._num_failed += 1
        error = result.error or result.status
        if error in self._errors or len(self._errors) < MAX_ERRORS_COUNTED:
            self._errors[error] += 1

    def verdict(self) -> EngineError | None:
        """Return why the run has to stop; None where it may go on."""
        limit = self._config.max_failed_percent
        if self._num_ended < MIN_ROWS_ENDED or 100 * self._num_failed <= limit * self._num_ended:
            return None
        ((error, count),) = self._errors.most_common(1)
        return EngineError(
            f"{self._num_failed} of {self._num_ended} rows failed, more than "
            f"engine.max_failed_percent ({limit:g}) allows. The most frequent error "
            f"({count} rows): {error}. Mend its cause, then `raydiff retry-failed` "
            "repeats them; or allow more."
        )
