"""Patience with an output folder that cannot be written: full, read-only, or out of reach."""

from collections.abc import Callable

from raydiff.errors import DiskError

PATIENCE_S = 120.0
"""Longest outage that a run waits out; its workers pause meanwhile."""
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 10.0


class Outage:
    """Says when to write again after a failure, and when to give up."""

    def __init__(
        self, *, patience_s: float | None = None, on_warning: Callable[[str], None]
    ) -> None:
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._on_warning = on_warning
        self._since: float | None = None
        self._retry_at = 0.0
        self._retry_s = FIRST_RETRY_S

    @property
    def is_on(self) -> bool:
        """Whether the last attempt to write failed."""
        return self._since is not None

    def may_try(self, now: float) -> bool:
        """Return whether it is time to write, or to write again."""
        return self._since is None or now >= self._retry_at

    def failed(self, error: DiskError, now: float) -> None:
        """Take in a failure. Raises it when this has gone on for too long."""
        if self._since is None:
            self._since, self._retry_s = now, FIRST_RETRY_S
            self._on_warning(f"{error} Trying again for {self._patience_s:.0f} s.")
        elif now - self._since >= self._patience_s:
            raise error
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def succeeded(self, now: float) -> None:
        """Take in that everything is written."""
        if self._since is not None:
            self._on_warning(f"The output can be written again, after {now - self._since:.0f} s.")
        self._since = None
