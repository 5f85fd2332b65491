"""One driver per output folder: a kernel lock on OUT/.lock, which ends with its process, and an
epoch, which keeps a driver that lost the folder without noticing from committing."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from raydiff.errors import EngineError, OutputError

LOCK_FILE = ".lock"
METADATA_DIR = "metadata"
EPOCH_IN_NAME = re.compile(r"\.?part-(\d+)-\d+\.parquet.*")
UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
NUM_ATTEMPTS = 10
ATTEMPT_S = 0.05
"""Someone who only looks whether the lock is held holds it for microseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LockHolder:
    """Who drives, or last drove, a run. `epoch` is one higher for every driver."""

    epoch: int
    host: str
    pid: int
    started_at: float
    """Unix time, seconds."""
    is_released: bool = False


class RunLock:
    """The right to commit to one output folder.

    On file systems without flock a driver is refused only if the last one is a live process of
    this host; otherwise it takes over, and `check` stops the other at its next commit.
    """

    def __init__(self, out_dir: str | Path) -> None:
        self._path = Path(out_dir) / LOCK_FILE
        self._descriptor: int | None = None
        self._content = b""
        self.epoch = 0

    def acquire(self) -> Self:
        """Take the folder. Raises OutputError naming the driver that has it."""
        descriptor = self._open_and_lock()
        try:
            last = _read_holder(descriptor)
            self.epoch = max(last.epoch if last else 0, _last_epoch(self._path.parent)) + 1
            self._descriptor = descriptor
            self._write(is_released=False)
        except OSError as error:
            self._drop(descriptor)
            raise _not_writable(self._path.parent, error) from error
        except BaseException:
            self._drop(descriptor)
            raise
        return self

    def check(self) -> None:
        """Raise EngineError if the folder is no longer this driver's: it must not commit."""
        try:
            content = self._path.read_bytes()
        except OSError:
            content = b""
        if self._descriptor is None or content != self._content:
            raise EngineError(
                f"{self._path}: this driver (epoch {self.epoch}) no longer holds the folder: "
                f"{_whose(content)}. It stops without committing; nothing that was committed is "
                "lost."
            )

    def release(self) -> None:
        """Give the folder back; a lock that was lost or never taken is left as it is."""
        if self._descriptor is None:
            return
        with contextlib.suppress(EngineError, OSError):
            self.check()
            self._write(is_released=True)
        self._drop(self._descriptor)

    def _drop(self, descriptor: int) -> None:
        os.close(descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        return self.acquire() if self._descriptor is None else self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _open_and_lock(self) -> int:
        for attempt in range(NUM_ATTEMPTS):
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise _not_writable(self._path.parent, error) from None
            if _try_lock(descriptor) and _is_same_file(descriptor, self._path):
                return descriptor
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if attempt + 1 < NUM_ATTEMPTS:
                time.sleep(ATTEMPT_S)
        raise OutputError(
            f"output folder {self._path.parent}: another driver is at work in it: "
            f"{_describe(holder)}. Wait for it, stop it, or choose another --out."
        )

    def _write(self, *, is_released: bool) -> None:
        if self._descriptor is None:
            return
        holder = LockHolder(
            epoch=self.epoch,
            host=platform.node(),
            pid=os.getpid(),
            started_at=time.time(),
            is_released=is_released,
        )
        self._content = json.dumps(asdict(holder)).encode()
        # In place: a renamed file would be another inode, which this lock does not hold.
        os.pwrite(self._descriptor, self._content, 0)
        os.ftruncate(self._descriptor, len(self._content))
        os.fsync(self._descriptor)


def lock_holder(out_dir: str | Path) -> LockHolder | None:
    """Return who holds the folder's lock now, or None if nobody does."""
    try:
        descriptor = os.open(Path(out_dir) / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _read_holder(descriptor)
    finally:
        os.close(descriptor)


def is_process_alive(pid: int) -> bool:
    """Return whether this host has a process `pid`, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _try_lock(descriptor: int, mode: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        holder = _read_holder(descriptor)
        is_here = holder is not None and not holder.is_released and holder.host == platform.node()
        return not (holder is not None and is_here and is_process_alive(holder.pid))
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Tell whether `path` is still the file that was locked, not a newer one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> LockHolder | None:
    return _parse(os.pread(descriptor, 4096, 0))


def _parse(content: bytes) -> LockHolder | None:
    try:
        return LockHolder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _last_epoch(out_dir: Path) -> int:
    """Return the highest epoch in the names of the metadata, in case the lock file was removed."""
    folder = out_dir / METADATA_DIR
    paths = folder.iterdir() if folder.is_dir() else []
    matches = (EPOCH_IN_NAME.fullmatch(path.name) for path in paths)
    return max((int(match[1]) for match in matches if match), default=0)


def _not_writable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output folder {folder}: not writable: {error.strerror}. Choose another --out."
    )


def _whose(content: bytes) -> str:
    holder = _parse(content)
    return f"it is now {_describe(holder)}'s" if holder else "its lock file was removed or replaced"


def _describe(holder: LockHolder | None) -> str:
    if holder is None:
        return "an unnamed process"
    since = datetime.fromtimestamp(holder.started_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {holder.pid} on {holder.host}, since {since}"
