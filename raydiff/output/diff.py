"""Two runs compared: which requests both have, and how far apart their images are.

Files whose sha256 are equal are not decoded; all others are, in threads, a few at a time.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from raydiff.output.frames import Pixels, read_image
from raydiff.output.matching import BY_REQUEST, Row, match, read_side
from raydiff.output.media_files import (
    MediaError,
    check_media,
    describe_media,
    is_clip,
    media_name,
    open_media,
)
from raydiff.output.rows_file import plain
from raydiff.output.similarity import FrameComparison, Similarity
from raydiff.output.storage import Storage
from raydiff.output.video.audio import Audio, sound_snr
from raydiff.output.video.clip_reader import open_clip

PAIRS_IN_FLIGHT = 64

Outcome = Literal[
    "equal",
    "both_failed",
    "missing_file",
    "broken_file",
    "one_failed",
    "different_size",
    "different",
    "only_left",
    "only_right",
]
SAME: tuple[Outcome, ...] = ("equal", "both_failed")
WORST_FIRST: tuple[Outcome, ...] = (
    *("missing_file", "broken_file", "one_failed", "different_size", "different"),
    *("only_left", "only_right"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One request that is not the same in both runs."""

    outcome: Outcome
    key: dict[str, Any]
    """The columns that rows are matched by, with their values."""
    left_row: int | None = None
    """row_index in the left run, None if it has no such request."""
    right_row: int | None = None
    left_file: str | None = None
    right_file: str | None = None
    message: str | None = None
    """Why pixels could not be compared, or what differs beside them."""
    similarity: Similarity | None = None

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sorts the worst first: what could not be compared, then the lowest PSNR."""
        psnr = self.similarity.psnr if self.similarity else 0.0
        row = self.left_row if self.left_row is not None else self.right_row
        return (WORST_FIRST.index(self.outcome), psnr, row or 0)


class RunDiff:
    """Iterate it once for the differences, as they are found; the counts are complete after that.

    Memory is some 300 bytes for each row of the two runs, and the images of a pair per thread.
    """

    def __init__(
        self,
        left: str | Path | Storage,
        right: str | Path | Storage,
        *,
        on: Sequence[str] = BY_REQUEST,
        num_threads: int = 4,
    ) -> None:
        """Read and match the rows. Raises OutputError if one folder is not a run, ConfigError
        if the columns `on` cannot match its rows."""
        self._num_threads = num_threads
        self.on = tuple(on)
        self._left, self._right = read_side(left, self.on), read_side(right, self.on)
        self._matches = match(self._left, self._right)
        self.counts: Counter[Outcome] = Counter()
        self.similarities: list[Similarity] = []
        """Of the pairs whose pixels differ."""
        self.num_pairs = len(self._matches.left)
        self.num_without_key = (self._left.num_without_key, self._right.num_without_key)
        """Rows of the left and the right run that were left out, for want of a key."""

    @property
    def is_same(self) -> bool:
        """Whether no difference was found."""
        return not any(count for outcome, count in self.counts.items() if outcome not in SAME)

    def __iter__(self) -> Iterator[Difference]:
        for compared in self._compared():
            self.counts[compared.outcome] += 1
            if compared.outcome == "different" and compared.similarity is not None:
                self.similarities.append(compared.similarity)
            if compared.outcome not in SAME:
                yield compared
        for row in self._left.rows(self._matches.only_left):
            self.counts["only_left"] += 1
            yield self._difference("only_left", row, None)
        for row in self._right.rows(self._matches.only_right):
            self.counts["only_right"] += 1
            yield self._difference("only_right", None, row)

    def _compared(self) -> Iterator[Difference]:
        waiting: deque[Future[Difference]] = deque()
        lefts, rights = self._left.rows(self._matches.left), self._right.rows(self._matches.right)
        with ThreadPoolExecutor(self._num_threads) as pool:
            try:
                for left, right in zip(lefts, rights, strict=True):
                    waiting.append(pool.submit(self._compare, left, right))
                    if len(waiting) >= PAIRS_IN_FLIGHT:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _compare(self, left: Row, right: Row) -> Difference:
        verdict = _judge(
            _Image("left", self._left.out, left), _Image("right", self._right.out, right)
        )
        return self._difference(verdict.outcome, left, right, verdict.message, verdict.similarity)

    def _difference(
        self,
        outcome: Outcome,
        left: Row | None,
        right: Row | None,
        message: str | None = None,
        similarity: Similarity | None = None,
    ) -> Difference:
        row = left or right or {}
        return Difference(
            outcome=outcome,
            key={name: row[name] for name in self.on},
            left_row=left["row_index"] if left else None,
            right_row=right["row_index"] if right else None,
            left_file=describe_media(left) if left else None,
            right_file=describe_media(right) if right else None,
            message=message,
            similarity=similarity,
        )


def difference_table(differences: Sequence[Difference], on: Sequence[str]) -> pa.Table:
    """Return differences as a table: what is matched by, the outcome, metrics, rows and files."""
    columns = {name: _key_column([one.key[name] for one in differences]) for name in on}
    columns["outcome"] = pa.array([one.outcome for one in differences], pa.string())
    metrics = {"max_abs": pa.int32(), "psnr": pa.float64(), "ssim": pa.float64()}
    for name, type_ in metrics.items():
        values = [getattr(one.similarity, name, None) for one in differences]
        columns[name] = pa.array(values, type_)
    for name in ("message", "left_file", "right_file"):
        columns[name] = pa.array([getattr(one, name) for one in differences], pa.string())
    for name in ("left_row", "right_row"):
        columns[name] = pa.array([getattr(one, name) for one in differences], pa.int64())
    return pa.table(columns)


def _key_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # The runs have it as different types.
        texts = [None if value is None else str(plain(value)) for value in values]
        return pa.array(texts, pa.string())


class _Verdict(NamedTuple):
    outcome: Outcome
    message: str | None = None
    similarity: Similarity | None = None


class _Image(NamedTuple):
    """The image or clip of one run's row, by the name of its side."""

    side: str
    out: Storage
    row: Row

    @property
    def is_clip(self) -> bool:
        return is_clip(media_name(self.row))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put side and file before what a MediaError says."""
        try:
            yield
        except MediaError as error:
            message = f"{self.side} {describe_media(self.row)}: {error}"
            raise MediaError(message, is_missing=error.is_missing) from None

    def check(self) -> None:
        """Raise MediaError if the file is not there with the size that the metadata says."""
        with self.named():
            check_media(self.out, self.row)

    def pixels(self) -> Pixels:
        """Return the image, uint8 (H, W, 3). Raises MediaError."""
        with self.named(), open_media(self.out, self.row) as file:
            return np.asarray(read_image(file))

    def frames(self) -> Iterator[Pixels]:
        """Yield the clip's frames, uint8 (H, W, 3). Raises MediaError."""
        with self.named(), open_clip(self.out, self.row) as clip:
            yield from clip.frames()

    def sound(self) -> Audio | None:
        """Return the clip's sound. Raises MediaError."""
        with self.named(), open_clip(self.out, self.row) as clip:
            return clip.sound()


def _judge(left: _Image, right: _Image) -> _Verdict:
    """Say what a request became in the two runs."""
    failures = [
        f"{one.side} {one.row['status']}: {one.row['error']}"
        for one in (left, right)
        if one.row["status"] != "completed"
    ]
    if failures:
        return _Verdict("both_failed" if len(failures) == 2 else "one_failed", failures[0])
    try:
        left.check()
        right.check()
        if left.row["sha256"] == right.row["sha256"]:
            return _Verdict("equal")
        return _compare_clips(left, right) if left.is_clip else _compare_images(left, right)
    except MediaError as error:
        return _Verdict("missing_file" if error.is_missing else "broken_file", str(error))


def _compare_images(left: _Image, right: _Image) -> _Verdict:
    if right.is_clip:
        return _Verdict("different_size", "an image and a clip")
    frames = FrameComparison()
    one, other = left.pixels(), right.pixels()
    if one.shape != other.shape:
        return _Verdict("different_size", f"{_size(one)} and {_size(other)}")
    frames.add(one, other)
    return _verdict(frames.result())


def _compare_clips(left: _Image, right: _Image) -> _Verdict:
    if not right.is_clip:
        return _Verdict("different_size", "a clip and an image")
    frames = FrameComparison()
    num_frames = 0
    for one, other in zip_longest(left.frames(), right.frames()):
        if one is None or other is None:
            longer = "left" if other is None else "right"
            return _Verdict("different_size", f"the {longer} has more than {num_frames} frames")
        if one.shape != other.shape:
            return _Verdict("different_size", f"{_size(one)} and {_size(other)}")
        frames.add(one, other)
        num_frames += 1
    if not num_frames:
        return _Verdict("broken_file", f"{left.side} and {right.side}: no frame can be decoded")
    similarity = frames.result()
    if sound_snr(left.sound(), right.sound()) != math.inf:
        return _Verdict("different", "the sound differs", similarity)
    return _verdict(similarity)


def _verdict(similarity: Similarity) -> _Verdict:
    return _Verdict("equal" if similarity.is_equal else "different", None, similarity)


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
