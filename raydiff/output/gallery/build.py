"""Build a gallery from a run's metadata, again and again while the run goes on.

The page's own status.js comes last and names the chunks that belong together, so whoever opens
or refreshes the page meets one state of the run, whole.
"""

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from raydiff import __version__
from raydiff.config import LTX2Config, RunConfig
from raydiff.errors import OutputError
from raydiff.output.atomic import disk_error, replace_file
from raydiff.output.gallery.chunks import (
    CHUNK_ROWS,
    call_script,
    chunk_script,
    describe_columns,
    dumps,
    plain_columns,
)
from raydiff.output.gallery.thumbnails import PENDING, MediaPlace, Thumbnails
from raydiff.output.ledger import read_results
from raydiff.output.media_files import MEDIA_COLUMNS, describe_media
from raydiff.output.metadata_schema import REQUEST_COLUMNS, VIDEO_COLUMNS
from raydiff.output.progress import read_progress
from raydiff.output.run_file import CLIP_KEYS, IMAGE_KEYS, RunFile, read_run
from raydiff.output.storage import open_storage

GALLERY_DIR = "gallery"
DATA_DIR = "data"
STATUS_SCRIPT = "status.js"
PAGE = "index.html"
INTERVAL_S = 2.0
MAX_LOAD = 0.2
"""Share of the time that a refreshed gallery may spend on it."""
NOT_IN_MANIFEST = ("init_image_sha256", "model_revision", "video_mode", "text_encoder")
"""Columns of a request that follow from the others or from the run's settings."""
RECIPE_KEYS = {
    "model": ("variant", "dtype", "vae_dtype"),
    "ltx2": tuple(LTX2Config.model_fields),
    "output": (*IMAGE_KEYS, *CLIP_KEYS),
}
"""Settings that change the bytes of a file and are not in its row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refresh:
    """What one building of the gallery found and did."""

    page: Path
    num_rows: int
    num_made: int
    """Thumbnails made this time."""
    num_pending: int
    """Thumbnails left for the next time."""
    problems: tuple[str, ...]
    """Files that no thumbnail could be made of, and why."""
    is_running: bool


class Gallery:
    """The gallery of the run in `out_dir`, in `folder` (OUT/gallery if None)."""

    def __init__(self, out_dir: str | Path, folder: str | Path | None = None) -> None:
        """Raises OutputError if `out_dir` is not a run or `folder` holds something else."""
        self._out_dir = _local_folder(out_dir)
        self._run = read_run(out_dir)
        self.folder = self._out_dir / GALLERY_DIR if folder is None else Path(folder)
        self._data = self.folder / DATA_DIR
        self._thumbnails = Thumbnails(self._out_dir, self.folder)
        self._status: dict[str, Any] = {}
        _make_folder(self.folder)

    def refresh(
        self,
        *,
        is_watched: bool = False,
        thumbnails_s: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Refresh:
        """Bring the page up to what the metadata says now.

        Thumbnails are made for up to `thumbnails_s` seconds; `on_progress` gets how many new files
        have been looked at, and of how many. A page that `is_watched` asks for news by itself.
        Raises OutputError, DiskError.
        """
        progress = read_progress(self._out_dir)
        table = read_results(self._out_dir, scores=True)
        num_made = self._thumbnails.num_made
        places = _media_places(table)
        problems = self._thumbnails.make(
            places.items(),
            deadline=None if thumbnails_s is None else time.monotonic() + thumbnails_s,
            on_progress=on_progress,
        )
        with _disk_errors(self.folder):
            self._write_assets()
            chunks, columns = self._write_chunks(table, problems)
            self._write_status(
                {
                    "title": self._out_dir.resolve().name,
                    "raydiff_version": __version__,
                    "state": progress.state,
                    "num_expected": progress.total,
                    "refresh_s": INTERVAL_S if is_watched else None,
                    "root": _relative_url(self._out_dir, self.folder),
                    "settings": _settings(self._run),
                    "manifest_columns": [
                        name
                        for name in (*REQUEST_COLUMNS, *VIDEO_COLUMNS)
                        if name not in NOT_IN_MANIFEST
                    ],
                    "columns": columns,
                    "chunk_rows": CHUNK_ROWS,
                    "num_rows": table.num_rows,
                    "chunks": chunks,
                }
            )
        return Refresh(
            page=self.folder / PAGE,
            num_rows=table.num_rows,
            num_made=self._thumbnails.num_made - num_made,
            num_pending=sum(problem == PENDING for problem in problems.values()),
            problems=tuple(
                f"{_describe(places[request_id])}: {problem}"
                for request_id, problem in problems.items()
                if problem != PENDING
            ),
            is_running=progress.state == "running",
        )

    def watch(self) -> Generator[Refresh, None, None]:
        """Refresh while the run goes on; the pages stop asking when the iterator is closed."""
        try:
            while True:
                started = time.monotonic()
                found = self.refresh(is_watched=True, thumbnails_s=INTERVAL_S)
                yield found
                if not found.is_running and not found.num_pending:
                    return
                elapsed_s = time.monotonic() - started
                if not found.num_pending:
                    time.sleep(max(INTERVAL_S, elapsed_s / MAX_LOAD))
        finally:
            with _disk_errors(self.folder):
                self._write_status({**self._status, "refresh_s": None})

    def _write_assets(self) -> None:
        for asset in (files(__package__) / "assets").iterdir():
            _replace(self.folder / asset.name, asset.read_bytes())

    def _write_chunks(
        self, table: pa.Table, problems: dict[str, str]
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Write the chunks that are not there; return their names and the columns."""
        self._data.mkdir(exist_ok=True)
        plain, kinds = plain_columns(table)
        columns = describe_columns(plain, kinds)
        request_ids = table["request_id"].to_pylist()
        flaws = pa.array([problems.get(one) for one in request_ids], pa.string())
        known = {path.name for path in self._data.iterdir()}
        names = []
        for start in range(0, table.num_rows, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            name, script = chunk_script(plain[rows], flaws[rows])
            if name not in known:
                replace_file(self._data / name, script, is_durable=False)
            names.append(name)
        # A page that has just read the last status may still be loading its chunks.
        for name in known - {*names, *self._status.get("chunks", ()), STATUS_SCRIPT}:
            (self._data / name).unlink(missing_ok=True)
        return names, columns

    def _write_status(self, status: dict[str, Any]) -> None:
        self._status = status
        if status:
            _replace(self._data / STATUS_SCRIPT, call_script("receiveStatus", dumps(status)))


def _local_folder(out: str | Path) -> Path:
    storage = open_storage(out)
    path = storage.local_path("")
    if path is None:
        raise OutputError(
            f"{storage.uri}: a gallery is opened by a browser, which reads local files alone. Copy "
            f"the run to a folder first, e.g. aws s3 sync {storage.uri} FOLDER"
        )
    return path


def _make_folder(folder: Path) -> None:
    """Make the folder if its parent is there; refuse one that holds anything but a gallery."""
    try:
        folder.mkdir(exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        raise OutputError(
            f"gallery folder {folder}: {folder.parent} does not exist. Make it, or choose another."
        ) from None
    except OSError as error:
        raise OutputError(
            f"gallery folder {folder}: {error.strerror}. Choose another with --to."
        ) from None
    if names and not (folder / DATA_DIR / STATUS_SCRIPT).is_file() and names - {DATA_DIR}:
        raise OutputError(
            f"gallery folder {folder}: it holds {min(names)!r} and is not a gallery. "
            "Choose a new or empty folder with --to."
        )


def _media_places(table: pa.Table) -> dict[str, MediaPlace]:
    """Return where the image of each request lies that has one."""
    table = table.filter(pc.and_(pc.is_valid(table["file_name"]), pc.is_valid(table["request_id"])))
    columns = (table[name].to_pylist() for name in MEDIA_COLUMNS)
    return dict(zip(table["request_id"].to_pylist(), zip(*columns, strict=True), strict=True))


def _describe(place: MediaPlace) -> str | None:
    return describe_media(dict(zip(MEDIA_COLUMNS, place, strict=True)))


def _replace(path: Path, data: bytes) -> None:
    """Write a file, unless it is the same already: object stores and caches go by change."""
    if not path.is_file() or path.read_bytes() != data:
        replace_file(path, data, is_durable=False)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(Path(error.filename or folder), error) from error


def _relative_url(out_dir: Path, folder: Path) -> str:
    path = os.path.relpath(out_dir.resolve(), folder.resolve())
    return quote(Path(path).as_posix()) + "/"


def _settings(run: RunFile) -> dict[str, Any]:
    """Return the run's settings, other than the defaults, that a row's image depends on."""
    defaults = RunConfig().model_dump(mode="json")
    return {
        f"{section}.{key}": run.config[section][key]
        for section, keys in RECIPE_KEYS.items()
        for key in keys
        if run.config.get(section, {}).get(key, defaults[section][key]) != defaults[section][key]
    }
