"""The rows of a run that an export takes: each distinct image once, with the columns asked for.

Rows come in the order of their commit, in chunks of one split whose images fit in memory together.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydiff.errors import ConfigError, OutputError, nearest
from raydiff.output.keys import Keys, request_keys
from raydiff.output.media_files import (
    MEDIA_COLUMNS,
    MediaError,
    describe_media,
    is_clip,
    is_video,
    media_name,
    read_media,
)
from raydiff.output.metadata_schema import VIDEO_COLUMNS
from raydiff.output.query import open_results
from raydiff.output.rows_file import plain
from raydiff.output.scores import read_scores, score_names
from raydiff.output.storage import Storage

LEFT_OUT = (
    *("status", "error", "file_name", "member", "offset", "init_image"),
    *("worker_id", "node", "encode_s", "denoise_s", "decode_s", "write_s", "peak_vram_bytes"),
)
"""Columns that a dataset has only if they are asked for by name: where and how fast a row was
rendered, and paths of that machine. Those of MEDIA_COLUMNS say nothing outside the run."""
OF_CLIPS = (*VIDEO_COLUMNS, "duration_s", "audio_sample_rate", "nfe")
"""Columns that are empty in a run of images."""
NEVER = ("file_name", "member", "offset")
NEEDED = ("request_id", "status", "sha256", "model", "model_revision", *MEDIA_COLUMNS)
READ_ROWS = 4096
CHUNK_ROWS = 100
CHUNK_BYTES = 16 * 2**20
NUM_READERS = 8
BYTES_IN_FLIGHT = 256 * 2**20
"""Of images that are being read ahead."""
DEFAULT_SPLIT = "train"
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]{1,32}")
MAX_SPLITS = 32


class Sample(NamedTuple):
    """An image or video, and its name: the request_id and what kind it is."""

    key: str
    ending: str
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Samples of one split, and their metadata row by row."""

    split: str
    rows: pa.Table
    samples: list[Sample]


class ExportRows:
    """The samples of a run; iterate it once."""

    def __init__(
        self,
        out: Storage,
        *,
        columns: Sequence[str] | None = None,
        split: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`columns` are those of the results and of the scores; None takes what a dataset needs.

        Raises OutputError if `out` is not a run, ConfigError for columns that cannot be used.
        """
        self._out = out
        self._chunk_bytes = chunk_bytes
        self._results = open_results(out)
        self._is_completed = pc.field("status") == "completed"
        self.endings = self._find_endings()
        """Kinds of files: .png, .jpg, .webp, .mp4, ..."""
        self._scores = _Scores(out)
        known = pa.unify_schemas([self._results.schema, *self._scores.schemas])
        self._columns = _chosen(known, columns, has_clips=any(map(is_clip, self.endings)))
        self._split = split
        self.schema = pa.schema(
            [(name, _portable(known.field(name).type)) for name in self._columns]
        )
        ids = self._results.to_table(columns=["request_id"], filter=self._is_completed)
        self._keys = np.unique(request_keys(ids["request_id"])[0])
        self.num_samples = len(self._keys)
        """Distinct images of the run."""
        self.splits = self._find_splits(known)
        self.problems: list[str] = []
        """Files that were left out, and why."""

    @property
    def has_images(self) -> bool:
        """Whether some samples are images; a GIF is one to those who read a dataset."""
        return not all(map(is_video, self.endings))

    @property
    def has_videos(self) -> bool:
        """Whether some samples are videos."""
        return any(map(is_video, self.endings))

    def __iter__(self) -> Iterator[Chunk]:
        waiting = {split: _Waiting() for split in self.splits}
        for row, sample, split in self._read_ahead():
            one = waiting[split]
            one.add(row, sample)
            if len(one.samples) >= CHUNK_ROWS or one.num_bytes >= self._chunk_bytes:
                yield one.chunk(split)
                waiting[split] = _Waiting()
        for split, one in waiting.items():
            if one.samples:
                yield one.chunk(split)

    # -- what there is -------------------------------------------------------------------------

    def _find_splits(self, known: pa.Schema) -> tuple[str, ...]:
        if self._split is None:
            return (DEFAULT_SPLIT,)
        if self._split not in known.names:
            raise _unknown(self._split, known, "--split")
        dtype = _portable(known.field(self._split).type)
        if not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype)):
            raise ConfigError(f"--split {self._split}: it is no text. Name a column of text.")
        found: set[str | None] = set()
        for batch in self._results.to_batches(columns=[self._split], filter=self._is_completed):
            found.update(pc.unique(batch.column(0)).to_pylist())
            if len(found) > MAX_SPLITS:
                raise ConfigError(
                    f"--split {self._split}: it has more than {MAX_SPLITS} values. Name a column "
                    "with a few, such as train and test."
                )
        names: list[str] = []
        for value in found:
            if value is None or not SPLIT_NAME.fullmatch(value):
                raise ConfigError(
                    f"--split {self._split}: {value!r} cannot name a split. Every row needs "
                    "letters, digits and _ there, up to 32, such as train."
                )
            names.append(value)
        return tuple(sorted(names))

    def _find_endings(self) -> frozenset[str]:
        found: set[str] = set()
        names = ["file_name", "member"]
        for batch in self._results.to_batches(columns=names, filter=self._is_completed):
            media = pc.coalesce(batch.column("member"), batch.column("file_name"))
            endings = pc.replace_substring_regex(media, r".*\.", ".")
            found.update(pc.unique(endings).to_pylist())
        if ".json" in found:
            raise OutputError(
                f"{self._out.uri}: its clips are folders of frames (output.video frames), which no "
                "dataset holds. Render them as mp4, webm or gif."
            )
        return frozenset(found)

    # -- reading -------------------------------------------------------------------------------

    def _read_ahead(self) -> Iterator[tuple[pa.Table, Sample, str]]:
        """Yield each row with its image; files that cannot be read are left out and told."""
        waiting: deque[tuple[_Row, Future[bytes | MediaError]]] = deque()
        num_bytes = 0
        with ThreadPoolExecutor(NUM_READERS) as pool:
            try:
                for row in self._distinct_rows():
                    waiting.append((row, pool.submit(_read, self._out, row.place)))
                    num_bytes += row.place["size_bytes"]
                    while num_bytes > BYTES_IN_FLIGHT or len(waiting) > CHUNK_ROWS:
                        num_bytes -= waiting[0][0].place["size_bytes"]
                        yield from self._read_one(*waiting.popleft())
                while waiting:
                    yield from self._read_one(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _read_one(
        self, row: "_Row", future: Future[bytes | MediaError]
    ) -> Iterator[tuple[pa.Table, Sample, str]]:
        data = future.result()
        if isinstance(data, MediaError):
            self.problems.append(f"{describe_media(row.place)}: {data}")
            return
        ending = media_name(row.place).rpartition(".")[2].lower()
        yield row.values, Sample(row.place["request_id"], ending, data), row.split

    def _distinct_rows(self) -> Iterator["_Row"]:
        is_seen = np.zeros(len(self._keys), dtype=bool)
        in_results = [name for name in self._columns if name in self._results.schema.names]
        wanted = list(dict.fromkeys([*in_results, *NEEDED, *([self._split] * bool(self._split))]))
        for batch in self._results.to_batches(
            columns=wanted, filter=self._is_completed, batch_size=READ_ROWS
        ):
            table = pa.Table.from_batches([batch])
            new = self._first_rows(table, is_seen)
            if not len(new):
                continue
            table = table.take(pa.array(new))
            yield from self._rows(table)

    def _first_rows(self, table: pa.Table, is_seen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the rows of `table` whose image no row before them has, and mark it as seen."""
        keys, _ = request_keys(table["request_id"])
        keys, rows = np.unique(keys, return_index=True)
        places = np.searchsorted(self._keys, keys)
        is_new = ~is_seen[places]
        is_seen[places[is_new]] = True
        return np.sort(rows[is_new])

    def _rows(self, table: pa.Table) -> Iterator["_Row"]:
        places = table.select(list(NEEDED)).to_pylist()
        splits = table[self._split].to_pylist() if self._split else [DEFAULT_SPLIT] * len(places)
        values = _without_paths(self._scores.joined(table)).select(self._columns)
        columns = zip(values.columns, self.schema.types, strict=True)
        values = pa.table([_cast(*column) for column in columns], schema=self.schema)
        for index, (place, split) in enumerate(zip(places, splits, strict=True)):
            yield _Row(values.slice(index, 1), place, split)


class _Row(NamedTuple):
    values: pa.Table
    place: dict[str, Any]
    split: str


class _Waiting:
    """Samples of one split on their way into a chunk."""

    def __init__(self) -> None:
        self.rows: list[pa.Table] = []
        self.samples: list[Sample] = []
        self.num_bytes = 0

    def add(self, row: pa.Table, sample: Sample) -> None:
        self.rows.append(row)
        self.samples.append(sample)
        self.num_bytes += len(sample.data)

    def chunk(self, split: str) -> Chunk:
        rows = pa.concat_tables(self.rows).combine_chunks()
        return Chunk(split=split, rows=rows, samples=self.samples)


class _Scores:
    """The scores of a run, by request."""

    def __init__(self, out: Storage) -> None:
        self._tables = [read_scores(out, name) for name in score_names(out)]
        self._keys: list[tuple[Keys, NDArray[np.int64]]] = []
        for table in self._tables:
            keys, places = request_keys(table["request_id"])
            order = np.argsort(keys)
            self._keys.append((keys[order], places[order]))
        self.schemas = [table.schema.remove(0) for table in self._tables]

    def joined(self, table: pa.Table) -> pa.Table:
        """Append the scores of the requests in `table`, null where there is none."""
        wanted, _ = request_keys(table["request_id"])
        for scores, (keys, places) in zip(self._tables, self._keys, strict=True):
            if not len(keys):
                found = pa.nulls(len(wanted), pa.int64())
            else:
                index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
                found = pa.array(places[index], mask=keys[index] != wanted)
            for name in scores.column_names[1:]:
                table = table.append_column(name, scores[name].take(found))
        return table


def _chosen(known: pa.Schema, columns: Sequence[str] | None, *, has_clips: bool) -> list[str]:
    if columns is None:
        left_out = LEFT_OUT if has_clips else (*LEFT_OUT, *OF_CLIPS)
        return [name for name in known.names if name not in left_out]
    for name in columns:
        if name not in known.names:
            raise _unknown(name, known, "--columns")
        if name in NEVER:
            raise ConfigError(f"--columns {name}: it is about the files of the run. Leave it out.")
    return list(dict.fromkeys(columns))


def _unknown(name: str, known: pa.Schema, option: str) -> ConfigError:
    names = known.names
    return ConfigError(
        f"{option} {name}: the run has no such column; {nearest(name, names)}"
        f"known: {', '.join(names)}"
    )


def _read(out: Storage, place: dict[str, Any]) -> bytes | MediaError:
    try:
        data = read_media(out, place)
    except MediaError as error:
        return error
    if hashlib.sha256(data).hexdigest() != place["sha256"]:
        return MediaError("its sha256 is not what the metadata says; raydiff verify tells more")
    return data


def _portable(dtype: pa.DataType) -> pa.DataType:
    """Return the type in which a column is exported: maps become JSON, which every reader has."""
    if pa.types.is_dictionary(dtype):
        return dtype.value_type
    return pa.string() if "map<" in str(dtype) else dtype


def _cast(column: pa.ChunkedArray, dtype: pa.DataType) -> pa.ChunkedArray:
    if "map<" not in str(column.type):
        return column.cast(dtype)
    values = column.to_pylist()
    texts = [None if one is None else json.dumps(plain(one), ensure_ascii=False) for one in values]
    return pa.chunked_array([pa.array(texts, dtype)])


def _without_paths(table: pa.Table) -> pa.Table:
    """Name a local checkpoint without the path that it has on the machine of the run."""
    if "model" not in table.column_names:
        return table
    is_local = pc.starts_with(table["model_revision"], "local-")
    if not pc.any(is_local).as_py():
        return table
    names = [None if one is None else PurePath(one).name for one in table["model"].to_pylist()]
    model = pc.if_else(is_local, pa.array(names, pa.string()), table["model"])
    return table.set_column(table.column_names.index("model"), "model", model)
