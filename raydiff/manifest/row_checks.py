"""Check a manifest by whole columns: what `read_rows` finds in its rows, without making them.

Rows that share their settings (all but texts, seed and init image) are checked once together.
Rows with an init image go row by row, and so do bad ones until enough of them are explained.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raydiff.config import RunConfig
from raydiff.errors import RowError
from raydiff.manifest.columns import (
    Flags,
    Keys,
    given,
    group_rows,
    mixed,
    read_seeds,
    read_texts,
)
from raydiff.manifest.reader import Manifest
from raydiff.manifest.rows import Models, row_rules
from raydiff.manifest.schema import COLUMNS, MAX_SEED, check_value, known_values, plain_array
from raydiff.manifest.seeds import SeedContent, derive_seeds, seed_content
from raydiff.request import BatchKey, RenderRequest, batch_key, with_request_id

CHUNK_ROWS = 65_536
CHUNK_BYTES = 64 * 2**20
MAX_CHUNK_IMAGES = 2**20
MAX_REMEMBERED_SETTINGS = 100_000
PER_ROW = ("prompt", "negative_prompt", "seed", "init_image")
"""Known columns whose values differ from row to row; the others are the row's settings."""


class CheckedImages(NamedTuple):
    """Images in the order of the manifest, one place each; a bad row has one, without a request."""

    row_index: NDArray[np.int64]
    image_index: NDArray[np.int64]
    request: Keys
    """64 bits that equal requests share, and others all but surely do not, within one process."""
    shape: NDArray[np.int32]
    """Which of `RowChecks.shapes`; -1 in bad rows."""


class RowChecks:
    """Iterate it once for the images of all rows; memory does not grow with the manifest."""

    def __init__(
        self, manifest: Manifest, *, config: RunConfig, models: Models, max_errors: int
    ) -> None:
        """Raises what `read_rows` does; `max_errors` of the bad rows are explained."""
        self._manifest = manifest
        self._limit = config.limit
        self._default_negative = config.defaults.negative_prompt
        self._default_seed = config.defaults.seed
        self._rules = row_rules(manifest, config, models)
        self._setting_names = [
            name for name in COLUMNS if name in manifest.schema.names and name not in PER_ROW
        ]
        self._known: dict[tuple[Any, ...], _Settings] = {}
        self._shapes: dict[BatchKey, int] = {}
        self._max_errors = max_errors
        self.errors: list[str] = []
        """What is wrong with the first bad rows."""

    @property
    def shapes(self) -> list[BatchKey]:
        """The shapes met so far."""
        return list(self._shapes)

    def __iter__(self) -> Iterator[CheckedImages]:
        for first_row, batch in _chunks(self._manifest, self._limit):
            rows = self._check(first_row, batch)
            for start, stop in _spans(rows.num_images):
                yield self._images(rows, start, stop)

    def _check(self, first_row: int, batch: pa.RecordBatch) -> "_Rows":
        """Check a chunk's rows, all but those with an init image."""
        groups, group = group_rows(batch, self._setting_names)
        settings = [self._settings(values) for values in groups]
        num_images = np.array([one.num_images for one in settings])[group]
        prompt = read_texts(batch, "prompt")
        negative = read_texts(batch, "negative_prompt")
        seed = read_seeds(batch)
        is_alone = given(batch, "init_image")
        is_bad = np.array([one.is_bad for one in settings])[group]
        is_bad |= ~prompt.is_given | prompt.is_bad | negative.is_bad | seed.is_bad
        if self._default_seed is not None:
            seed.values[~seed.is_given] = self._default_seed
        is_bad |= seed.values > MAX_SEED - (num_images - 1)
        is_bad &= ~is_alone
        if self._default_seed is None:
            unseeded = np.flatnonzero(~(seed.is_given | is_bad | is_alone))
            contents = [one.seed_content for one in settings]
            seed.values[unseeded] = derive_seeds(
                zip(
                    map(contents.__getitem__, group[unseeded].tolist()),
                    (first_row + unseeded).tolist(),
                    prompt.values[unseeded].tolist(),
                    negative.values[unseeded].tolist(),
                    strict=True,
                )
            )
        keys = np.array([one.key for one in settings], np.uint64)[group]
        negative.hashes[~negative.is_given] = hash(self._default_negative) % 2**64
        return _Rows(
            first_row=first_row,
            batch=batch,
            request=mixed(mixed(keys, prompt.hashes), negative.hashes),
            seed=seed.values,
            num_images=np.where(is_bad | is_alone, 1, num_images),
            shape=np.where(is_bad, -1, np.array([one.shape for one in settings], np.int32)[group]),
            is_bad=is_bad,
            is_alone=is_alone,
        )

    def _images(self, rows: "_Rows", start: int, stop: int) -> CheckedImages:
        """Return the images of some rows of a chunk; those checked alone stand in their places."""
        counts = rows.num_images[start:stop]
        row = np.repeat(np.arange(start, stop), counts)
        image = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        request = mixed(rows.request[row], (rows.seed[row] + image).astype(np.uint64))
        images = CheckedImages(row + rows.first_row, image, request, rows.shape[row])
        closer = rows.is_alone[start:stop].copy()
        bad = np.flatnonzero(rows.is_bad[start:stop])
        closer[bad[: self._max_errors - len(self.errors)]] = True
        if not closer.any():
            return images
        found = [
            image
            for place in (np.flatnonzero(closer) + start).tolist()
            for image in self._check_alone(rows.first_row + place, rows.batch.slice(place, 1))
        ]
        others = [column[~closer[row - start]] for column in images]
        together = [
            np.concatenate([column, np.array(more, column.dtype)])
            for column, more in zip(others, zip(*found, strict=True), strict=True)
        ]
        order = np.argsort(together[0], kind="stable")
        return CheckedImages(*(column[order] for column in together))

    def _check_alone(
        self, row_index: int, row: pa.RecordBatch
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield what `CheckedImages` has of each of a row's images."""
        try:
            seed, num_images, values = self._rules.apply(row_index, next(known_values(row)))
        except RowError as error:
            if len(self.errors) < self._max_errors:
                self.errors.append(f"row {row_index}: {error}")
            yield row_index, 0, 0, -1
            return
        for image_index in range(num_images):
            request = with_request_id(RenderRequest(**values, seed=seed + image_index))
            yield row_index, image_index, _key(request), self._shape(request)

    def _settings(self, values: tuple[Any, ...]) -> "_Settings":
        """Check settings once, in a row that has nothing else wrong with it."""
        known = self._known.get(values)
        if known is None:
            if len(self._known) >= MAX_REMEMBERED_SETTINGS:
                self._known.clear()
            known = self._known[values] = self._check_settings(values)
        return known

    def _check_settings(self, values: tuple[Any, ...]) -> "_Settings":
        named = zip(self._setting_names, values, strict=True)
        own = {name: value for name, value in named if value is not None}
        try:
            _, num_images, fields = self._rules.apply(0, {"prompt": "", "seed": 0, **own})
        except RowError:
            return _Settings(True, 1, 0, -1, seed_content({}))
        request = with_request_id(RenderRequest(**{**fields, "negative_prompt": None}, seed=0))
        checked = {name: check_value(name, value) for name, value in own.items()}
        return _Settings(
            False, num_images, _key(request), self._shape(request), seed_content(checked)
        )

    def _shape(self, request: RenderRequest) -> int:
        return self._shapes.setdefault(batch_key(request), len(self._shapes))


class _Settings(NamedTuple):
    """What is known of the rows that share their settings."""

    is_bad: bool
    num_images: int
    key: int
    """64 bits of the settings' part of the request."""
    shape: int
    seed_content: SeedContent


class _Rows(NamedTuple):
    """The rows of a chunk; of those that are checked alone, only their place is right."""

    first_row: int
    batch: pa.RecordBatch
    request: Keys
    """Of everything but the seed."""
    seed: NDArray[np.int64]
    num_images: NDArray[np.int64]
    shape: NDArray[np.int32]
    is_bad: Flags
    is_alone: Flags


def _chunks(manifest: Manifest, limit: int | None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (row index of its first row, known columns of many rows), up to `limit` rows."""
    names = [name for name in manifest.schema.names if name in COLUMNS]
    waiting: list[pa.RecordBatch] = []
    first_row = end = num_bytes = 0
    for row, batch in manifest.batches():
        if limit is not None and row >= limit:
            break
        known = batch.select(names).slice(0, None if limit is None else limit - row)
        waiting.append(known)
        num_bytes += known.nbytes
        end = row + known.num_rows
        if end - first_row >= CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
            yield first_row, _joined(waiting)
            waiting, first_row, num_bytes = [], end, 0
    if waiting:
        yield first_row, _joined(waiting)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    names = batches[0].schema.names
    columns = [
        pa.concat_arrays([plain_array(batch.column(name)) for batch in batches]) for name in names
    ]
    return pa.RecordBatch.from_arrays(columns, names=names)


def _spans(num_images: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of stretches of rows that make at most MAX_CHUNK_IMAGES, or one row."""
    ends = np.cumsum(num_images)
    start = 0
    while start < len(ends):
        made = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, made + MAX_CHUNK_IMAGES, side="right")))
        yield start, stop
        start = stop


def _key(request: RenderRequest) -> int:
    return int(request.request_id[:16], 16)
