"""Who drives a run: what a lock says of its holder."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHolder:
    """Who drives, or last drove, a run. `epoch` is one higher for every driver."""

    epoch: int
    host: str
    pid: int
    started_at: float
    """Unix time, seconds."""
    is_released: bool = False
    token: str = ""
    """Tells one process from another of the same epoch, host and pid."""


def parse_holder(content: bytes) -> LockHolder | None:
    """Return what a lock file says, None if it is torn."""
    try:
        return LockHolder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def describe_holder(holder: LockHolder | None) -> str:
    """Name a driver to people."""
    if holder is None:
        return "an unnamed process"
    since = datetime.fromtimestamp(holder.started_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {holder.pid} on {holder.host}, since {since}"


def is_process_alive(pid: int) -> bool:
    """Return whether this host has a process `pid`, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
