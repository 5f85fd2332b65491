"""Check a run's metadata against its files: every completed row's file is there, whole and with
its sha256; every row stands once; files without a row are named."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydiff.output.keys import Keys, request_key, request_keys, row_keys
from raydiff.output.lock import METADATA_DIR
from raydiff.output.media_files import (
    MediaError,
    describe_media,
    open_media,
    with_media_columns,
)
from raydiff.output.media_store import IMAGES_DIR, REQUEST_ID
from raydiff.output.part_files import DamagedPartError, Part, list_parts, map_parts, read_columns
from raydiff.output.run_file import read_run
from raydiff.output.shard_index import SHARDS_DIR
from raydiff.output.storage import Storage, open_storage

NUM_THREADS = 8
FILES_IN_FLIGHT = 256
READ_BYTES = 1 << 20

ProblemKind = Literal[
    "missing_file",
    "unreadable_file",
    "wrong_size",
    "wrong_sha256",
    "duplicate_row",
    "unknown_row",
    "damaged_part",
    "orphan",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is not as it should be. An `orphan` is no error: a file without a row, as a
    crash leaves it, or as a driver at work is about to commit it."""

    kind: ProblemKind
    message: str
    row_index: int | None = None
    file_name: str | None = None

    @property
    def is_error(self) -> bool:
        """Whether the run's results are wrong because of it."""
        return self.kind != "orphan"


class Verification:
    """Iterate it once for the problems, as they are found; the counts are complete after that.

    Memory is about 20 bytes for each row of the metadata.
    """

    def __init__(self, out: str | Path | Storage, *, num_threads: int = NUM_THREADS) -> None:
        """Raises OutputError if `out` is not a run."""
        self._out = open_storage(out)
        self._folder = self._out.folder(METADATA_DIR)
        self._num_threads = num_threads
        self.num_manifest_rows = read_run(self._out).num_rows
        self.num_rows = 0
        """Rows of the metadata, one for each image of a manifest row."""
        self.num_missing_rows = 0
        """Manifest rows that have none: not rendered yet."""
        self.num_files = 0
        """Files hashed."""
        self.num_bytes = 0
        self._damaged: set[str] = set()
        self._shards: set[str] = set()
        """Shards that rows name."""

    def __iter__(self) -> Iterator[Problem]:
        summaries, damaged = map_parts(self._folder, _SUMMARY_COLUMNS, _summarise)
        self._damaged = set(damaged)
        yield from self._check_rows(_joined(summary.rows for summary in summaries))
        files = np.unique(_joined(summary.completed for summary in summaries))
        del summaries
        yield from self._check_files(files)
        for uri in sorted(self._damaged):
            yield Problem(kind="damaged_part", message=f"{uri}: damaged; its rows are lost")
        yield from self._find_orphans(files)

    def _check_rows(self, keys: Keys) -> Iterator[Problem]:
        keys.sort()
        for key in np.unique(keys[1:][keys[1:] == keys[:-1]]).tolist():
            row, image = key >> 12, key & 4095
            yield Problem(
                kind="duplicate_row",
                row_index=row,
                message=f"row {row}, image {image} stands more than once in the metadata",
            )
        rows = np.unique(keys >> np.uint64(12))
        for row in rows[rows >= self.num_manifest_rows].tolist():
            yield Problem(
                kind="unknown_row",
                row_index=row,
                message=f"row {row} is not in the manifest, which has {self.num_manifest_rows}",
            )
        self.num_rows = len(keys)
        self.num_missing_rows = self.num_manifest_rows - int((rows < self.num_manifest_rows).sum())

    def _check_files(self, files: Keys) -> Iterator[Problem]:
        waiting: deque[Future[_Checked]] = deque()
        with ThreadPoolExecutor(self._num_threads) as pool:
            try:
                for claim in self._claims(files):
                    if claim.member is not None:
                        self._shards.add(claim.file_name)
                    waiting.append(pool.submit(_check_file, self._out, claim))
                    if len(waiting) >= FILES_IN_FLIGHT:
                        yield from self._count(waiting.popleft().result())
                while waiting:
                    yield from self._count(waiting.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _count(self, checked: "_Checked") -> Iterator[Problem]:
        self.num_files += 1
        self.num_bytes += checked.num_bytes
        if checked.problem is not None:
            yield checked.problem

    def _claims(self, files: Keys) -> Iterator["_Claim"]:
        """Yield each of `files` once, with what the first row that names it says of it."""
        is_seen = np.zeros(len(files), dtype=bool)
        while not is_seen.all():
            try:
                for part in list_parts(self._folder).live:
                    table = self._read_claims(part)
                    yield from _new_claims(table, files, is_seen) if table else ()
                return
            except FileNotFoundError:
                continue  # A driver at work merged it away since it was listed.

    def _read_claims(self, part: Part) -> pa.Table | None:
        try:
            return with_media_columns(read_columns(part, _CLAIM_COLUMNS))
        except DamagedPartError as error:
            self._damaged.add(error.uri)
            return None

    def _find_orphans(self, files: Keys) -> Iterator[Problem]:
        named = (name for name in self._image_files() if not _is_among(_stem(name), files))
        shards = (f"{SHARDS_DIR}/{name}" for name in self._out.list_names(SHARDS_DIR))
        unnamed = (one for one in shards if one.endswith(".tar") and one not in self._shards)
        for name in itertools.chain(named, unnamed):
            yield Problem(kind="orphan", file_name=name, message=f"{name}: no row names this file")

    def _image_files(self) -> Iterator[str]:
        for folder in self._out.list_names(IMAGES_DIR):
            if not folder.startswith("."):
                yield from self._files_in(f"{IMAGES_DIR}/{folder}")

    def _files_in(self, folder: str) -> Iterator[str]:
        """Yield the files in a folder, or the name itself if it is a file."""
        try:
            yield from (f"{folder}/{name}" for name in self._out.list_names(folder))
        except NotADirectoryError:
            yield folder


class _Summary(NamedTuple):
    rows: Keys
    completed: Keys


class _Claim(NamedTuple):
    row_index: int
    file_name: str
    sha256: str
    size_bytes: int
    member: str | None
    offset: int | None


class _Checked(NamedTuple):
    num_bytes: int
    problem: Problem | None


_SUMMARY_COLUMNS = ("row_index", "image_index", "request_id", "status")
_CLAIM_COLUMNS = ("request_id", "status", *_Claim._fields)


def _summarise(table: pa.Table) -> _Summary:
    completed = table.filter(pc.equal(table["status"], "completed"))
    return _Summary(row_keys(table), request_keys(completed["request_id"])[0])


def _joined(arrays: Iterable[Keys]) -> Keys:
    return np.concatenate([np.empty(0, np.uint64), *arrays])


def _new_claims(table: pa.Table, files: Keys, is_seen: NDArray[np.bool_]) -> Iterator[_Claim]:
    """Yield the claims of `table` on files not seen before, and mark them as seen."""
    table = table.filter(pc.equal(table["status"], "completed"))
    keys, _ = request_keys(table["request_id"])
    keys, rows = np.unique(keys, return_index=True)
    places = np.minimum(np.searchsorted(files, keys), len(files) - 1)
    is_new = (files[places] == keys) & ~is_seen[places]
    is_seen[places[is_new]] = True
    new_rows = table.select(_Claim._fields).take(pa.array(np.sort(rows[is_new])))
    for batch in new_rows.to_batches(max_chunksize=4096):
        yield from itertools.starmap(
            _Claim, zip(*(c.to_pylist() for c in batch.columns), strict=True)
        )


def _check_file(out: Storage, claim: _Claim) -> _Checked:
    digest = hashlib.sha256()
    size = 0
    try:
        with open_media(out, claim._asdict()) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                size += len(block)
    except MediaError as error:
        kind: ProblemKind = "missing_file" if error.is_missing else "unreadable_file"
        return _Checked(size, _file_problem(claim, kind, str(error)))
    except OSError as error:
        return _Checked(size, _file_problem(claim, "unreadable_file", f"{error.strerror}"))
    if size != claim.size_bytes:
        rule = f"it has {size:,} bytes; the metadata says {claim.size_bytes:,}"
        return _Checked(size, _file_problem(claim, "wrong_size", rule))
    if digest.hexdigest() != claim.sha256:
        rule = f"its sha256 is {digest.hexdigest()}; the metadata says {claim.sha256}"
        return _Checked(size, _file_problem(claim, "wrong_sha256", rule))
    return _Checked(size, None)


def _file_problem(claim: _Claim, kind: ProblemKind, rule: str) -> Problem:
    name = describe_media(claim._asdict())
    return Problem(
        kind=kind,
        row_index=claim.row_index,
        file_name=claim.file_name,
        message=f"row {claim.row_index}: {name}: {rule}",
    )


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _is_among(request_id: str, files: Keys) -> bool:
    if not REQUEST_ID.fullmatch(request_id):
        return False
    key = np.uint64(request_key(request_id))
    place = int(np.searchsorted(files, key))
    return place < len(files) and bool(files[place] == key)
