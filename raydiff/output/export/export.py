"""A run's images and metadata as a dataset that other libraries load as it is."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raydiff.errors import OutputError
from raydiff.output.atomic import disk_error
from raydiff.output.export.dataset_card import dataset_card
from raydiff.output.export.folder import FolderTarget
from raydiff.output.export.parquet import ParquetTarget
from raydiff.output.export.rows import CHUNK_BYTES, ExportRows
from raydiff.output.export.tar import TarTarget
from raydiff.output.export.targets import ShardLimits, Target
from raydiff.output.run_file import read_run
from raydiff.output.storage import Storage, open_storage

ExportFormat = Literal["webdataset", "imagefolder", "hf-parquet"]

CARD = "README.md"
UNFINISHED = "_unfinished_export.json"
"""There from the first file to the last: an export that has it is not whole."""
TARGETS: dict[ExportFormat, type[Target]] = {
    "webdataset": TarTarget,
    "imagefolder": FolderTarget,
    "hf-parquet": ParquetTarget,
}
SPLIT = r"[A-Za-z0-9_]{1,32}"
OURS = re.compile(
    rf"README\.md|{SPLIT}\.json|data/{SPLIT}-\d{{5,}}\.(tar|parquet)|{SPLIT}/metadata\.parquet"
    rf"|{SPLIT}/[0-9a-f]{{2}}/[0-9a-f]{{32}}\.\w+|(.*/)?\.[^/]+\.tmp"
)
"""Names that an export has given its files, the temporary ones of a killed process included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What an export wrote."""

    num_samples: dict[str, int]
    """By split."""
    num_bytes: int
    """Of the images."""
    problems: tuple[str, ...]
    """Files that were left out, and why."""


def export_run(
    out: str | Path | Storage,
    dest: str | Path | Storage,
    *,
    to: ExportFormat,
    columns: Sequence[str] | None = None,
    split: str | None = None,
    shard_rows: int = 1000,
    max_shard_mb: int = 500,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExportSummary:
    """Write the completed images of a run, each once, with their metadata into `dest`.

    `columns` of the results and scores; the values of the column `split` name the splits.
    `dest` is a new or empty folder, or what an interrupted export of this run left there, which
    is begun anew. A file that is missing or damaged is left out and told. `on_progress` gets the
    samples written so far and their number. Raises OutputError, ConfigError, DiskError.
    """
    source, place = open_storage(out), open_storage(dest)
    limits = ShardLimits(num_samples=shard_rows, num_bytes=max_shard_mb * 10**6)
    chunk_bytes = min(CHUNK_BYTES, limits.num_bytes)
    rows = ExportRows(source, columns=columns, split=split, chunk_bytes=chunk_bytes)
    if not rows.num_samples:
        raise OutputError(f"{source.uri}: the run has no completed image to export yet.")
    with _disk_errors(place):
        _take(place, _identity(source))
        with TARGETS[to](place, rows, limits) as target:
            for chunk in rows:
                target.add(chunk)
                if on_progress is not None:
                    on_progress(target.num_samples.total(), rows.num_samples)
            target.finish()
            place.put(CARD, _card(source, target))
        place.delete([UNFINISHED])
    return ExportSummary(
        num_samples=dict(target.num_samples),
        num_bytes=target.num_bytes.total(),
        problems=tuple(rows.problems),
    )


def _card(source: Storage, target: Target) -> bytes:
    return dataset_card(
        title=source.uri.rstrip("/").rpartition("/")[2],
        loading=target.loading,
        paths=target.paths,
        num_samples=target.num_samples,
        num_bytes=target.num_bytes,
        file_bytes=target.file_bytes,
        schema=target.card_schema,
    )


def _identity(source: Storage) -> dict[str, Any]:
    """Return what tells this run from any other."""
    run = read_run(source)
    return {"manifest_fingerprint": run.manifest_fingerprint, "created_at": run.created_at}


def _take(dest: Storage, identity: dict[str, Any]) -> None:
    """Make `dest` ready for an export. Raises OutputError if it holds something else."""
    _make_folder(dest)
    names = [file.name for file in dest.list_files()]
    if names:
        _check_leftovers(dest, names, identity)
        dest.delete(name for name in names if name != UNFINISHED)
    dest.put(UNFINISHED, json.dumps(identity).encode() + b"\n")


def _make_folder(dest: Storage) -> None:
    path = dest.local_path("")
    if path is None:
        return
    try:
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise OutputError(
            f"--dest {path}: {path.parent} does not exist. Make it, or choose another."
        ) from None
    except FileExistsError:
        raise OutputError(f"--dest {path}: it is a file. Name a new or empty folder.") from None


def _check_leftovers(dest: Storage, names: list[str], identity: dict[str, Any]) -> None:
    """Raise OutputError unless all of `names` are of an interrupted export of the same run."""
    remedy = "Choose a new or empty folder."
    foreign = [name for name in names if name != UNFINISHED and not OURS.fullmatch(name)]
    if UNFINISHED not in names or foreign:
        what = foreign[0] if foreign else names[0]
        raise OutputError(f"--dest {dest.uri}: it holds {what!r} already. {remedy}")
    if _parsed(dest.read(UNFINISHED)) != identity:
        raise OutputError(f"--dest {dest.uri}: it holds a part of another run's export. {remedy}")


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


@contextmanager
def _disk_errors(dest: Storage) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error.filename or dest.uri, error) from error
