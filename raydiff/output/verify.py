"""Check a run's metadata against its files: every completed row's file is there, whole and with
its sha256, and so are each frame that an index lists and the WAV file that goes with a clip; every
row stands once; files without a row are named."""

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
    is_frames_index,
    open_media,
)
from raydiff.output.media_store import IMAGES_DIR, REQUEST_ID, VIDEOS_DIR
from raydiff.output.part_files import DamagedPartError, Part, list_parts, map_parts, read_columns
from raydiff.output.run_file import read_run
from raydiff.output.shards.index import SHARDS_DIR
from raydiff.output.storage import Storage, open_storage
from raydiff.output.video.clip_files import frame_rows, read_sound_file, sound_name

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
        run = read_run(self._out)
        self.num_manifest_rows = run.num_rows
        self._has_sounds = bool(run.config["output"].get("wav", False))
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
                    waiting.append(pool.submit(self._check, claim))
                    if len(waiting) >= FILES_IN_FLIGHT:
                        yield from self._count(waiting.popleft().result())
                while waiting:
                    yield from self._count(waiting.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _count(self, checked: "_Checked") -> Iterator[Problem]:
        self.num_files += checked.num_files
        self.num_bytes += checked.num_bytes
        yield from checked.problems

    def _check(self, claim: "_Claim") -> "_Checked":
        """Check the file of a claim, and the files that belong to it."""
        checked = _check_file(self._out, claim)
        if checked.problems:
            return checked
        parts = [checked]
        if is_frames_index(claim.file_name):
            parts += _check_frames(self._out, claim)
        if self._has_sounds and (claim.audio_sample_rate or claim.wav_sha256):
            parts.append(_check_sound(self._out, claim))
        return _Checked(
            num_files=sum(part.num_files for part in parts),
            num_bytes=sum(part.num_bytes for part in parts),
            problems=[problem for part in parts for problem in part.problems],
        )

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
            return read_columns(part, _CLAIM_COLUMNS)
        except DamagedPartError as error:
            self._damaged.add(error.uri)
            return None

    def _find_orphans(self, files: Keys) -> Iterator[Problem]:
        media = itertools.chain(self._files_under(IMAGES_DIR), self._files_under(VIDEOS_DIR))
        named = (name for name in media if not _is_among(_stem(name), files))
        shards = (f"{SHARDS_DIR}/{name}" for name in self._out.list_names(SHARDS_DIR))
        unnamed = (one for one in shards if one.endswith(".tar") and one not in self._shards)
        for name in itertools.chain(named, unnamed):
            yield _orphan(name)

    def _files_under(self, media_dir: str) -> Iterator[str]:
        for folder in self._out.list_names(media_dir):
            if not folder.startswith("."):
                yield from self._files_in(f"{media_dir}/{folder}")

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
    duration_s: float | None = None
    audio_sample_rate: int | None = None
    wav_sha256: str | None = None


class _Checked(NamedTuple):
    num_files: int
    num_bytes: int
    problems: list[Problem]


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
        return _checked(claim, size, _kind(error), str(error))
    except OSError as error:
        return _checked(claim, size, "unreadable_file", f"{error.strerror}")
    if size != claim.size_bytes:
        rule = f"it has {size:,} bytes; the metadata says {claim.size_bytes:,}"
        return _checked(claim, size, "wrong_size", rule)
    if digest.hexdigest() != claim.sha256:
        rule = f"its sha256 is {digest.hexdigest()}; the metadata says {claim.sha256}"
        return _checked(claim, size, "wrong_sha256", rule)
    return _Checked(1, size, [])


def _check_frames(out: Storage, claim: _Claim) -> list[_Checked]:
    """Check each frame as its index claims it, and name files that the index does not list."""
    try:
        frames = frame_rows(out, claim._asdict())
    except MediaError as error:
        return [_checked(claim, 0, _kind(error), str(error))]
    claims = [
        claim._replace(**{name: row[name] for name in ("file_name", "sha256", "size_bytes")})
        for row in frames
    ]
    checked = [_check_file(out, one) for one in claims]
    folder = claim.file_name.rpartition("/")[0]
    listed = {claim.file_name, *(one.file_name for one in claims)}
    found = (f"{folder}/{name}" for name in out.list_names(folder))
    orphans = [_orphan(name) for name in found if name not in listed]
    return [*checked, _Checked(0, 0, orphans)]


def _check_sound(out: Storage, claim: _Claim) -> _Checked:
    if claim.member is None:
        sound = claim._replace(file_name=sound_name(claim.file_name))
    else:
        sound = claim._replace(member=sound_name(claim.member))
    try:
        data = read_sound_file(out, claim._asdict())
    except MediaError as error:
        return _checked(sound, 0, _kind(error), str(error))
    digest = hashlib.sha256(data).hexdigest()
    if digest != (claim.wav_sha256 or digest):  # Older versions did not keep it.
        rule = f"its sha256 is {digest}; the metadata says {claim.wav_sha256}"
        return _checked(sound, len(data), "wrong_sha256", rule)
    return _Checked(1, len(data), [])


def _checked(claim: _Claim, num_bytes: int, kind: ProblemKind, rule: str) -> _Checked:
    name = describe_media(claim._asdict())
    problem = Problem(
        kind=kind,
        row_index=claim.row_index,
        file_name=claim.file_name,
        message=f"row {claim.row_index}: {name}: {rule}",
    )
    return _Checked(1, num_bytes, [problem])


def _kind(error: MediaError) -> ProblemKind:
    return "missing_file" if error.is_missing else "unreadable_file"


def _orphan(name: str) -> Problem:
    return Problem(kind="orphan", file_name=name, message=f"{name}: no row names this file")


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _is_among(request_id: str, files: Keys) -> bool:
    if not REQUEST_ID.fullmatch(request_id):
        return False
    key = np.uint64(request_key(request_id))
    place = int(np.searchsorted(files, key))
    return place < len(files) and bool(files[place] == key)
