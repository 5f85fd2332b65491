"""Files replaced in one step, so that neither a reader nor a crash ever meets half of one,
and what to tell the user when the disk refuses."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raydiff.errors import DiskError, OutputError
from raydiff.object_storage import StorageError

REMEDIES = {
    errno.ENOSPC: "Free space on that disk",
    errno.EDQUOT: "Free some of your quota on that disk",
    errno.EROFS: "Mount that disk writable",
    errno.EACCES: "Give this user write permission there",
    errno.EPERM: "Give this user write permission there",
    errno.EFBIG: "Raise the file size limit (ulimit -f)",
    errno.EIO: "Check that disk's health",
}


def disk_error(path: Path | str, error: OSError) -> DiskError:
    """Return the DiskError for `path` (or a URI), which `error` kept from being written."""
    if isinstance(error, StorageError):
        return DiskError(
            f"{error.uri}: could not be written: {error.reason}. {error.remedy}; the same command "
            "then continues the run."
        )
    reason = error.strerror or str(error)
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    remedy = REMEDIES.get(error.errno or 0, "Make that path writable")
    return DiskError(
        f"{path}: could not be written: {reason} ({name}). "
        f"{remedy}; the same command then continues the run."
    )


def replace_file(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Write `data` beside `path` and rename it there. Raises OSError, leaving `path` as it was.

    A durable file survives a power loss from here on: it and its folder are synced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if is_durable:
        sync_folder(path.parent)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write a report to; it takes the place of `path` if all goes well.

    For files that a command makes anew, not for a run's own. Raises OutputError.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OutputError(f"{path}: not a file. Name a file to write.")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
