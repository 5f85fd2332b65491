"""One driver per output folder, and an epoch that keeps a driver which lost the folder without
noticing from committing.

A local folder has a kernel lock on OUT/.lock, which ends with its process; a run in an object store
has a lease (see lease.py).
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Self

from raydiff.errors import EngineError, OutputError
from raydiff.output.holder import LockHolder, describe_holder, is_process_alive, parse_holder
from raydiff.output.lease import Lease, lease_holder
from raydiff.output.storage import Storage, open_storage, read_error

LOCK_FILE = ".lock"
METADATA_DIR = "metadata"
EPOCH_IN_NAME = re.compile(r"\.?part-(\d+)-\d+\.parquet.*")
UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
NUM_ATTEMPTS = 10
ATTEMPT_S = 0.05
"""Someone who only looks whether the lock is held holds it for microseconds."""


class RunLock:
    """The right to commit to one output folder, for one driver at a time."""

    def __init__(self, out: str | Path | Storage) -> None:
        self._out = open_storage(out)
        path = self._out.local_path(LOCK_FILE)
        self._hold: FileLock | Lease = Lease(self._out) if path is None else FileLock(path)
        self._is_taken = False

    @property
    def epoch(self) -> int:
        """One higher for every driver of the folder; 0 before it is taken."""
        return self._hold.epoch

    @property
    def warning(self) -> str | None:
        """What people should know of how well this folder is locked."""
        return self._hold.warning

    def acquire(self) -> Self:
        """Take the folder. Raises OutputError naming the driver that has it."""
        self._hold.acquire(_last_epoch(self._out))
        self._is_taken = True
        return self

    def check(self) -> None:
        """Raise EngineError if the folder is no longer this driver's: it must not commit.

        Raises DiskError if an object store cannot be asked.
        """
        self._hold.check()

    def release(self) -> None:
        """Give the folder back; a lock that was lost or never taken is left as it is."""
        if self._is_taken:
            self._is_taken = False
            self._hold.release()

    def __enter__(self) -> Self:
        return self if self._is_taken else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class FileLock:
    """A kernel lock on a file.

    On file systems without flock a driver is refused only if the last one is a live process of
    this host; otherwise it takes over, and `check` stops the other at its next commit.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._content = b""
        self.epoch = 0
        self.warning: str | None = None

    def acquire(self, last_epoch: int) -> None:
        """Take the folder with an epoch above `last_epoch`. Raises OutputError."""
        descriptor = self._open_and_lock()
        try:
            last = _read_holder(descriptor)
            self.epoch = max(last.epoch if last else 0, last_epoch) + 1
            self._descriptor = descriptor
            self._write(is_released=False)
        except OSError as error:
            self._drop(descriptor)
            raise _not_writable(self._path.parent, error) from error
        except BaseException:
            self._drop(descriptor)
            raise

    def check(self) -> None:
        """Raise EngineError if the file is not as this driver wrote it."""
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
        """Give the folder back."""
        if self._descriptor is None:
            return
        with contextlib.suppress(EngineError, OSError):
            self.check()
            self._write(is_released=True)
        self._drop(self._descriptor)

    def _drop(self, descriptor: int) -> None:
        os.close(descriptor)
        self._descriptor = None

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
            f"{describe_holder(holder)}. Wait for it, stop it, or choose another --out."
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


def lock_holder(out: str | Path | Storage) -> LockHolder | None:
    """Return who holds the folder's lock now, or None if nobody does."""
    storage = open_storage(out)
    path = storage.local_path(LOCK_FILE)
    if path is None:
        try:
            return lease_holder(storage)
        except OSError as error:
            raise read_error(storage.uri, error) from None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try_lock(descriptor, fcntl.LOCK_SH) else _read_holder(descriptor)
    finally:
        os.close(descriptor)


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
    return parse_holder(os.pread(descriptor, 4096, 0))


def _last_epoch(out: Storage) -> int:
    """Return the highest epoch in the names of the metadata, in case the lock file was removed."""
    try:
        names = out.list_names(METADATA_DIR)
    except OSError as error:
        raise read_error(out.describe(METADATA_DIR), error) from None
    matches = (EPOCH_IN_NAME.fullmatch(name) for name in names)
    return max((int(match[1]) for match in matches if match), default=0)


def _not_writable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output folder {folder}: not writable: {error.strerror}. Choose another --out."
    )


def _whose(content: bytes) -> str:
    holder = parse_holder(content)
    if holder is None:
        return "its lock file was removed or replaced"
    return f"it is now {describe_holder(holder)}'s"
