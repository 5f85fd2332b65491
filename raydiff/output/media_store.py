"""Files named by their request alone, each there whole or not at all, in a local folder or an
object store."""

import itertools
import os
import platform
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raydiff.errors import DiskError
from raydiff.output.atomic import disk_error
from raydiff.output.holder import is_process_alive
from raydiff.output.storage import Storage, open_storage

IMAGES_DIR = "images"
VIDEOS_DIR = "videos"
REQUEST_ID = re.compile(r"[0-9a-f]{32}")
TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}\.(?P<host>[\w-]*)\.(?P<pid>\d+)\.[0-9a-f]{8}-\d+\.tmp")
STALE_S = 3600.0
"""Age at which a temporary file of another host, whose processes cannot be seen, is stale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """An image or clip in place; each field is one of RenderResult."""

    file_name: str
    """Relative to the output folder, `/` separated; of a folder of frames its index."""
    sha256: str
    size_bytes: int
    duration_s: float | None = None
    audio_sample_rate: int | None = None
    """Of the sound that was made; None for a silent clip."""
    wav_sha256: str | None = None
    write_s: float
    """Seconds spent on encoding and writing."""


class MediaStore:
    """The files below `media_dir` of a run; any number of threads and processes may write at
    once, the same file too.

    Every file is written under `media_dir`/.tmp and renamed, so that it is whole or absent if a
    process dies. It is not synced: that takes 70 to 90 % off the small files per second (ext4 on
    an SSD). What a power loss undoes is found by its size when the run is resumed (see Ledger).
    In an object store a file is one request, and there once it is answered.
    """

    def __init__(self, out: str | Path | Storage, media_dir: str) -> None:
        # The driver has written to the store by now: an outage is waited out.
        self._storage = open_storage(out, has_answered=True)
        out_dir = self._storage.local_path("")
        self._out_dir = None if out_dir is None else str(out_dir)
        self._media_dir = media_dir
        self._folders: set[str] = set()
        self._counter = itertools.count()
        self._suffix = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"

    def put(self, file_name: str, request_id: str, data: bytes) -> None:
        """Write a file below the output folder. Raises DiskError."""
        try:
            if self._out_dir is None:
                self._storage.put(file_name, data)
            else:
                self._put_local(self._out_dir, file_name, request_id, data)
        except OSError as error:
            raise disk_error(self._storage.describe(file_name), error) from error

    @contextmanager
    def staged(self, file_name: str, request_id: str) -> Iterator[Path]:
        """Give a local path to write a file to; without an error it then gets its name.

        An OSError while it is written counts as the disk's. Raises DiskError.
        """
        try:
            if self._out_dir is None:
                with _local_file() as path:
                    yield path
                    self._storage.put_file(file_name, path)
                return
            temporary = Path(self._temporary(self._out_dir, request_id))
            target = f"{self._out_dir}/{file_name}"
            self._make_folder(self._out_dir, target.rpartition("/")[0])
            try:
                yield temporary
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._folders.clear()
            raise disk_error(self._storage.describe(file_name), error) from error

    def _put_local(self, out_dir: str, file_name: str, request_id: str, data: bytes) -> None:
        # Plain strings: with Path objects a small file takes a fifth longer.
        temporary, path = self._temporary(out_dir, request_id), f"{out_dir}/{file_name}"
        folder = path.rpartition("/")[0]
        self._make_folder(out_dir, folder)
        try:
            _write_and_rename(temporary, path, data)
        except FileNotFoundError:
            # The folder was removed, or another driver took the temporary file for stale.
            self._folders.clear()
            self._make_folder(out_dir, folder)
            _write_and_rename(temporary, path, data)

    def _temporary(self, out_dir: str, request_id: str) -> str:
        name = f"{request_id}.{self._suffix}-{next(self._counter)}.tmp"
        return f"{out_dir}/{self._media_dir}/.tmp/{name}"

    def _make_folder(self, out_dir: str, folder: str) -> None:
        """Make `folder`, those it lies in and the one for temporary files, but never the output
        folder itself."""
        if folder in self._folders:
            return
        top = f"{out_dir}/{self._media_dir}"
        inner = folder.removeprefix(f"{top}/").split("/")
        for one in (top, f"{top}/.tmp", *itertools.accumulate(inner, "{}/{}".format, initial=top)):
            Path(one).mkdir(exist_ok=True)
        self._folders.add(folder)


def media_path(media_dir: str, request_id: str) -> str:
    """Return `images/ab/<request_id>`, to which a file's ending is added.

    Raises DiskError for anything but 32 hex digits.
    """
    if not REQUEST_ID.fullmatch(request_id):
        raise DiskError(f"request_id is {request_id!r}; a file name needs 32 hex digits")
    return f"{media_dir}/{request_id[:2]}/{request_id}"


def remove_stale_files(out_dir: str | Path) -> int:
    """Remove what dead writers left under images/.tmp and videos/.tmp; return how many files."""
    folders = (Path(out_dir) / name / ".tmp" for name in (IMAGES_DIR, VIDEOS_DIR))
    return sum(_remove_stale(folder) for folder in folders if folder.is_dir())


def _remove_stale(folder: Path) -> int:
    num_removed = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY_NAME.fullmatch(entry.name)
            if match and _is_stale(entry, match["host"], int(match["pid"])):
                Path(entry.path).unlink(missing_ok=True)
                num_removed += 1
    return num_removed


@contextmanager
def _local_file() -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix="raydiff-")
    os.close(descriptor)
    path = Path(name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write_and_rename(temporary: str, path: str, data: bytes) -> None:
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)
        os.replace(temporary, path)  # noqa: PTH105
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _host() -> str:
    return re.sub(r"[^\w-]", "-", platform.node())


def _is_stale(entry: os.DirEntry[str], host: str, pid: int) -> bool:
    if host == _host() and not is_process_alive(pid):
        return True
    try:
        return time.time() - entry.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return False
