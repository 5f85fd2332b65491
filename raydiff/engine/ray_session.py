"""What a Ray needs around it: a token that nobody else reads, a folder that is removed, room in
shared memory, and its environment variables."""

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raydiff.errors import ConfigError, EngineError

SHM = Path("/dev/shm")
SESSION_PREFIX = "raydiff-"
MAX_TEMP_DIR_LENGTH = 20
"""Ray puts Unix sockets below it, and their paths may have 107 characters."""


def free_shm_bytes() -> int:
    """Return what is free for object stores; no bound is known where there is no /dev/shm."""
    return shutil.disk_usage(SHM).free if SHM.is_dir() else 2**60


def check_shm(size_bytes: int) -> None:
    """Refuse a small /dev/shm, as in a container by default: Ray would use slow disk instead."""
    free_bytes = free_shm_bytes()
    if free_bytes < size_bytes:
        raise EngineError(
            f"{SHM} has {free_bytes / 2**20:.0f} MiB free; Ray needs {size_bytes / 2**20:.0f}. "
            f"In a container, start it with --shm-size={size_bytes // 2**30 + 1}g."
        )


def check_token(insecure: bool) -> bool:
    """Return whether there is a token for a cluster, where Ray looks for it.

    Raises ConfigError where there is none (with `insecure` that is no error), or where other users
    of this machine may read its file.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        if insecure:
            return False
        raise ConfigError(
            f"{path}: no token for the cluster: {error.strerror}. Copy the cluster's own there "
            "(chmod 600), or name its file in RAY_AUTH_TOKEN_PATH."
        ) from None
    if mode & 0o077:
        raise ConfigError(
            f"{path}: other users may read this token (mode {mode:04o}), and with it run code on "
            f"the cluster. Run: chmod 600 {path}"
        )
    return True


def write_token(folder: Path) -> Path:
    """Write a new token into a file that only this user can read."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


@contextmanager
def session_dir() -> Iterator[Path]:
    """Make a folder for one session, and remove it; also those of drivers that were killed."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > MAX_TEMP_DIR_LENGTH:
        root = Path("/tmp")
    for folder in root.glob(f"{SESSION_PREFIX}*"):
        with suppress(OSError), (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=SESSION_PREFIX, dir=root, ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        # The lock ends with this process. It gets its name when it is held, not before.
        with (folder / "lock.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock.new").rename(folder / "lock")
            yield folder


@contextmanager
def environ(**variables: str | None) -> Iterator[None]:
    """Set environment variables (None removes one) and put the old values back."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environ(variables)
    try:
        yield
    finally:
        _set_environ(before)


def _set_environ(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
