"""Image files, named by their request alone, so that a render repeated after a crash lands on
itself and nothing in a prompt can choose a path."""

import hashlib
import itertools
import os
import platform
import re
import secrets
import time
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiff import __version__
from raydiff.config import OutputConfig
from raydiff.errors import DiskError
from raydiff.output.atomic import disk_error
from raydiff.output.holder import is_process_alive
from raydiff.output.media import encode_image
from raydiff.output.storage import Storage, open_storage
from raydiff.request import RenderRequest, RenderResult

IMAGES_DIR = "images"
TEMPORARY_DIR = "images/.tmp"
EMBEDDED_FIELDS = tuple(one.name for one in fields(RenderRequest) if one.name != "init_image")
_embedded_values = attrgetter(*EMBEDDED_FIELDS)
REQUEST_ID = re.compile(r"[0-9a-f]{32}")
TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}\.(?P<host>[\w-]*)\.(?P<pid>\d+)\.[0-9a-f]{8}-\d+\.tmp")
STALE_S = 3600.0
"""Age at which a temporary file of another host, whose processes cannot be seen, is stale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file in place. `file_name` is relative to the output folder, `/` separated."""

    file_name: str
    sha256: str
    size_bytes: int
    write_s: float


class Writer:
    """Encodes and writes images; any number of threads and processes may write at once, the same
    image too.

    Every file is written under images/.tmp and renamed, so that it is whole or absent if a
    process dies. It is not synced: that takes 70 to 90 % off the small files per second (ext4 on
    an SSD). What a power loss undoes is found by its size when the run is resumed (see Ledger).
    In an object store a file is one request, and there once it is answered.
    """

    def __init__(self, out: str | Path | Storage, config: OutputConfig) -> None:
        # The driver has written to the store by now: an outage is waited out.
        self._storage = open_storage(out, has_answered=True)
        out_dir = self._storage.local_path("")
        self._out_dir = None if out_dir is None else str(out_dir)
        self._config = config
        self._folders: set[str] = set()
        self._counter = itertools.count()
        self._suffix = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"

    def write(
        self, request: RenderRequest, pixels: NDArray[np.uint8], result: RenderResult
    ) -> list[RenderResult]:
        """Write the image of `request` and return its result, with the file's fields filled in.

        Raises DiskError.
        """
        file = self.save(request, pixels)
        return [
            replace(
                result,
                file_name=file.file_name,
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                write_s=file.write_s,
            )
        ]

    def flush(self) -> list[RenderResult]:
        """Return nothing: a file is in place once it is written."""
        return []

    def save(self, request: RenderRequest, pixels: NDArray[np.uint8]) -> WrittenFile:
        """Write the image of `request`, uint8 (H, W, 3). Raises DiskError."""
        started = time.perf_counter()
        file_name = image_name(request.request_id, self._config)
        metadata = None if self._config.strip_metadata else request_metadata(request)
        data = encode_image(pixels, config=self._config, metadata=metadata)
        self._save(file_name, request.request_id, data)
        return WrittenFile(
            file_name=file_name,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            write_s=time.perf_counter() - started,
        )

    def _save(self, file_name: str, request_id: str, data: bytes) -> None:
        try:
            if self._out_dir is None:
                self._storage.put(file_name, data)
            else:
                self._save_file(self._out_dir, file_name, request_id, data)
        except OSError as error:
            raise disk_error(self._storage.describe(file_name), error) from error

    def _save_file(self, out_dir: str, file_name: str, request_id: str, data: bytes) -> None:
        # Plain strings: with Path objects a small file takes a fifth longer.
        name = f"{request_id}.{self._suffix}-{next(self._counter)}.tmp"
        temporary, path = f"{out_dir}/{TEMPORARY_DIR}/{name}", f"{out_dir}/{file_name}"
        folder = path.rpartition("/")[0]
        self._make_folder(out_dir, folder)
        try:
            _write_and_rename(temporary, path, data)
        except FileNotFoundError:
            # The folder was removed, or another driver took the temporary file for stale.
            self._folders.clear()
            self._make_folder(out_dir, folder)
            _write_and_rename(temporary, path, data)

    def _make_folder(self, out_dir: str, folder: str) -> None:
        """Make `folder` and the one for temporary files, but never the output folder itself."""
        if folder in self._folders:
            return
        for one in (f"{out_dir}/{IMAGES_DIR}", f"{out_dir}/{TEMPORARY_DIR}", folder):
            Path(one).mkdir(exist_ok=True)
        self._folders.add(folder)


def image_name(request_id: str, config: OutputConfig) -> str:
    """Return `images/ab/<request_id>.png`. Raises DiskError for anything but 32 hex digits."""
    if not REQUEST_ID.fullmatch(request_id):
        raise DiskError(f"request_id is {request_id!r}; a file name needs 32 hex digits")
    return f"{IMAGES_DIR}/{request_id[:2]}/{request_id}.{config.image}"


def request_metadata(request: RenderRequest) -> dict[str, Any]:
    """Return what an image file says of its request: all but the paths of this machine."""
    values = dict(zip(EMBEDDED_FIELDS, _embedded_values(request), strict=True))
    if request.model_revision.startswith("local-"):
        values["model"] = PurePath(request.model).name
    known = {name: value for name, value in values.items() if value is not None}
    return {**known, "raydiff_version": __version__}


def remove_stale_files(out_dir: str | Path) -> int:
    """Remove what dead writers left under images/.tmp and return how many files that were."""
    folder = Path(out_dir) / TEMPORARY_DIR
    if not folder.is_dir():
        return 0
    num_removed = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY_NAME.fullmatch(entry.name)
            if match and _is_stale(entry, match["host"], int(match["pid"])):
                Path(entry.path).unlink(missing_ok=True)
                num_removed += 1
    return num_removed


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
