"""Images and clips as samples in tars, OUT/shards/000000.tar and on, as WebDataset reads them.

worker: open shard -> closed shard under a temporary name; driver: number and index -> metadata.
"""

import hashlib
import json
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydiff.config import OutputConfig
from raydiff.errors import DiskError, EngineError
from raydiff.output.atomic import disk_error
from raydiff.output.media import encode_image
from raydiff.output.media_files import is_clip
from raydiff.output.shards.index import (
    HEADER_BYTES,
    SHARDS_DIR,
    DamagedIndexError,
    ShardHeader,
    index_bytes,
    index_name,
    read_header,
    read_index,
    shard_name,
)
from raydiff.output.shards.open_shard import OpenShard, temporary_index
from raydiff.output.shards.recovery import HASHES, TOLD_IN_SAMPLES, find_samples
from raydiff.output.shards.samples import json_bytes, sample_bytes, text_bytes
from raydiff.output.storage import Storage, open_storage
from raydiff.output.video.audio import Audio
from raydiff.output.writer import clip_of, request_metadata
from raydiff.request import RenderRequest, RenderResult

TEMPORARY_DIR = f"{SHARDS_DIR}/.tmp"
PUBLISHED_NAME = re.compile(r"(\d{6,})\.(tar|json)")
LIST_FILE = f"{SHARDS_DIR}/index.json"
NUM_READERS = 16
"""Indexes read at once: an object store answers each after some milliseconds."""


class ShardWriter:
    """Collects a worker's images and clips in one open shard; any number of threads may write at
    once."""

    def __init__(
        self, out: str | Path | Storage, config: OutputConfig, *, worker_id: str = "w"
    ) -> None:
        """`worker_id` is what `ShardPublisher.rescue` finds the worker's shards by."""
        self._storage = open_storage(out)
        self._config = config
        self._prefix = f"{_owner(worker_id)}.{secrets.token_hex(8)}"
        self._num_begun = 0
        self._lock = threading.Lock()
        self._shard: OpenShard | None = None
        self._unclosed: list[OpenShard] = []
        """Shards that could not be closed; the next flush tries again."""

    def write(
        self,
        request: RenderRequest,
        pixels: NDArray[np.uint8],
        result: RenderResult,
        audio: Audio | None = None,
    ) -> list[RenderResult]:
        """Add the image or clip of `request`; return all results of its shard if that is full now.

        Raises DiskError, and RowError for a clip that the file's format cannot hold.
        """
        started = time.perf_counter()
        encoded = self._encoded(request, pixels, audio)
        result = replace(
            result,
            sha256=hashlib.sha256(encoded.media).hexdigest(),
            size_bytes=len(encoded.media),
            member=f"{request.request_id}.{encoded.ending}",
            duration_s=encoded.duration_s,
            audio_sample_rate=encoded.audio_sample_rate,
            wav_sha256=None if encoded.wav is None else hashlib.sha256(encoded.wav).hexdigest(),
        )
        texts = {} if self._config.strip_metadata else _texts(request, result)
        sound = {} if encoded.wav is None else {"wav": encoded.wav}
        sample = sample_bytes(request.request_id, encoded.ending, encoded.media, sound | texts)
        with self._lock:
            shard = self._shard = self._shard or self._begin()
            with _disk_errors(self._storage, shard.name):
                shard.append(sample, replace(result, write_s=time.perf_counter() - started))
            if len(shard.results) < self._config.shard_rows:
                return []
            self._shard = None
        return self._close(shard)

    def flush(self) -> list[RenderResult]:
        """Close the open shard and return the results of its rows. Raises DiskError."""
        with self._lock:
            shards, self._unclosed = self._unclosed, []
            if self._shard is not None and self._shard.results:
                shards.append(self._shard)
                self._shard = None
        return [result for shard in shards for result in self._close(shard)]

    def _encoded(
        self, request: RenderRequest, pixels: NDArray[np.uint8], audio: Audio | None
    ) -> "_Encoded":
        metadata = request_metadata(request)
        if request.video is None:
            media = encode_image(pixels, config=self._config, metadata=metadata)
            return _Encoded(self._config.image, media)
        from raydiff.output.video.writer import (  # takes what only clips need
            encode_clip,
            encode_sound,
        )

        clip = clip_of(request, request.video, audio, metadata)
        return _Encoded(
            ending=self._config.video,
            media=encode_clip(clip, [pixels], self._config),
            wav=encode_sound(clip, self._config),
            duration_s=clip.duration_s,
            audio_sample_rate=None if audio is None else audio.sample_rate,
        )

    def _begin(self) -> OpenShard:
        self._num_begun += 1
        name = f"{TEMPORARY_DIR}/{self._prefix}-{self._num_begun}.tar"
        with _disk_errors(self._storage, name):
            return OpenShard(self._storage, name)

    def _close(self, shard: OpenShard) -> list[RenderResult]:
        try:
            with _disk_errors(self._storage, shard.name):
                shard.close()
        except DiskError:
            with self._lock:
                self._unclosed.append(shard)
            raise
        return list(shard.results.values())


class ShardPublisher:
    """Gives closed shards their numbers, for the driver that holds the run's lock.

    The index is written first and claims the number: a crash between it and the tar's renaming
    leaves a pair that `adopt` brings together. A request that was rendered twice (its row lost
    after its shard was published) stays in both tars; the metadata names one of them.
    """

    def __init__(
        self,
        out: str | Path | Storage,
        config: OutputConfig,
        *,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        """`fence` raises where the run is no longer this driver's: RunLock.check."""
        self._storage = open_storage(out)
        self._fence = fence
        self._config = config
        self._published: dict[int, ShardHeader] = {}
        self._last = -1
        """Highest number that is taken."""
        self._claimed: dict[str, int] = {}
        """Numbers of temporary shards, from the moment that their index is in place."""
        self._placed: set[str] = set()
        """Temporary shards whose tar is in place too."""
        self._rescued: dict[str, list[RenderResult]] = {}
        """Temporary shards of dead workers, and what was copied from them."""

    def adopt(self, ledger_knows: Callable[[str], bool]) -> dict[str, RenderResult]:
        """Put right what the last session left; return results that the ledger does not know.

        Published shards whose rows were not committed are read. Samples of temporary shards, also
        of those that a killed worker left open in a local folder, are published now; then the
        temporary files are removed. Raises DiskError, EngineError.
        """
        found: dict[str, RenderResult] = {}
        with _disk_errors(self._storage, SHARDS_DIR):
            for number, header in self._numbered(ledger_knows):
                self._published[number] = header
                if not (ledger_knows(header.first) and ledger_knows(header.last)):
                    for result in read_index(self._storage.read(index_name(number)), number):
                        if not ledger_knows(result.request_id):
                            found.setdefault(result.request_id, result)
            for name in self._temporary_shards():
                results = self._copied(name, lambda one: one in found or ledger_knows(one))
                found.update({result.request_id: result for result in self.publish(results)})
            self._remove_temporaries()
        return found

    def rescue(self, worker_id: str, is_known: Callable[[str], bool]) -> list[RenderResult]:
        """Publish what a dead worker had rendered and not handed over; return its results.

        Requests that are known have ended. Call it before the worker's place is filled again. May
        be called again after a DiskError. Raises EngineError as `publish` does.
        """
        with _disk_errors(self._storage, TEMPORARY_DIR):
            names = self._temporary_shards(_owner(worker_id))
            for name in names:
                if name not in self._rescued:
                    self._rescued[name] = self._copied(name, is_known)
            results = [result for name in names for result in self._rescued[name]]
            published = self.publish(results)
            with suppress(OSError):  # Removed at the end, or by the next session.
                for name in names:
                    self._storage.delete([name, temporary_index(name)])
        return [replace(result, worker_id=worker_id) for result in published]

    def publish(self, results: Sequence[RenderResult]) -> list[RenderResult]:
        """Give the temporary shards that `results` name their place; return results that name it.

        Other results pass through. May be called again after a DiskError. Raises EngineError if a
        shard is gone, as it is when another driver has taken the run over.
        """
        names = {result.file_name: None for result in results if is_temporary(result.file_name)}
        # A shard that was rescued is of a dead worker, whose last words nobody heeds.
        places = {name: self._publish(str(name)) for name in names if name not in self._rescued}
        return [
            replace(result, file_name=places[result.file_name])
            if result.file_name in places
            else result
            for result in results
        ]

    def finish(self) -> None:
        """End a finished run: list all shards, as `wids` reads them. Raises DiskError."""
        shards = [
            {
                "url": shard_name(number).rpartition("/")[2],
                "nsamples": one.num_samples,
                "filesize": one.size_bytes,
            }
            for number, one in sorted(self._published.items())
        ]
        values = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
        with _disk_errors(self._storage, LIST_FILE):
            self._remove_temporaries()
            self._storage.put(LIST_FILE, json.dumps(values, indent=1).encode() + b"\n")

    # -- publication ---------------------------------------------------------------------------

    def _publish(self, name: str) -> str:
        if name in self._placed:
            return shard_name(self._claimed[name])
        self._fence()
        with _disk_errors(self._storage, name):
            data = self._read_temporary_index(name)
            header = read_header(data)
            if name not in self._claimed:
                self._claimed[name] = self._claim(data)
            number = self._claimed[name]
            self._move(header, number)
            self._placed.add(name)
            self._published[number] = header
            with suppress(OSError):  # Removed at the end, or by the next session.
                self._storage.delete([temporary_index(name)])
            return shard_name(number)

    def _read_temporary_index(self, name: str) -> bytes:
        try:
            return self._storage.read(temporary_index(name))
        except FileNotFoundError:
            raise self._gone(name) from None

    def _claim(self, data: bytes) -> int:
        """Write an index under the next number that is free."""
        while True:
            self._last += 1
            if self._storage.create(index_name(self._last), data):
                return self._last
            # A store may have written it, and its answer been lost.
            if self._storage.read(index_name(self._last)) == data:
                return self._last

    def _move(self, header: ShardHeader, number: int) -> None:
        try:
            self._storage.move(header.written_as, shard_name(number))
        except FileNotFoundError:
            if self._storage.size(shard_name(number)) != header.size_bytes:
                raise self._gone(header.written_as) from None

    def _gone(self, name: str) -> EngineError:
        return EngineError(
            f"{self._storage.describe(name)}: the shard is gone: another driver has taken this "
            "run over, or somebody has removed it. The same command renders its rows again."
        )

    # -- adoption ------------------------------------------------------------------------------

    def _numbered(self, ledger_knows: Callable[[str], bool]) -> Iterator[tuple[int, ShardHeader]]:
        """Yield the numbers that have a shard, and what its index says."""
        listed = (PUBLISHED_NAME.fullmatch(one) for one in self._storage.list_names(SHARDS_DIR))
        matches = [match for match in listed if match]
        numbers = sorted({int(match[1]) for match in matches})
        tars = {int(match[1]) for match in matches if match[2] == "tar"}
        self._last = max(numbers, default=-1)
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for number, header in zip(numbers, pool.map(self._header, numbers), strict=True):
                if number in tars:
                    header = header or self._rebuilt(number)
                elif not self._is_moved(number, header, ledger_knows):
                    continue
                if header is not None:
                    yield number, header

    def _header(self, number: int) -> ShardHeader | None:
        try:
            return read_header(self._storage.read_range(index_name(number), 0, HEADER_BYTES))
        except (FileNotFoundError, DamagedIndexError):
            return None

    def _rebuilt(self, number: int) -> ShardHeader | None:
        """Write the index of a published shard anew; None if nothing can be read there."""
        name = shard_name(number)
        with self._local_copy(name) as path:
            results = [sample.result for sample in find_samples(path, self._is_whole)]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes = path.stat().st_size
        if not results:
            return None
        header = ShardHeader(
            num_samples=len(results),
            size_bytes=size_bytes,
            sha256=digest,
            written_as=name,
            first=results[0].request_id,
            last=results[-1].request_id,
        )
        self._storage.put(index_name(number), index_bytes(header, results))
        return header

    def _is_moved(
        self, number: int, header: ShardHeader | None, ledger_knows: Callable[[str], bool]
    ) -> bool:
        """Bring to its index the tar that a crash kept from being moved there.

        An index whose tar is nowhere is removed, unless rows of the metadata name it.
        """
        if header is not None and self._storage.size(header.written_as) is not None:
            self._move(header, number)
            return True
        if header is None or not ledger_knows(header.first):
            self._storage.delete([index_name(number)])
            self._last = max(self._published, default=-1)
        return False

    def _temporary_shards(self, owner: str | None = None) -> list[str]:
        """Return the names of all temporary shards, or of those of one worker."""
        tars = [one for one in self._storage.list_names(TEMPORARY_DIR) if one.endswith(".tar")]
        return [
            f"{TEMPORARY_DIR}/{name}"
            for name in tars
            if owner is None or name.partition(".")[0] == owner
        ]

    def _copied(self, name: str, is_known: Callable[[str], bool]) -> list[RenderResult]:
        """Copy the samples of a temporary shard whose requests are not known into a new one.

        Its process may still be alive and writing.
        """
        is_whole = self._storage.size(temporary_index(name)) is not None
        if not is_whole and self._storage.local_path(name) is None:
            return []
        shard = OpenShard(self._storage, f"{TEMPORARY_DIR}/.{secrets.token_hex(8)}.tar")
        with self._local_copy(name) as path:
            for sample in find_samples(path, self._is_whole):
                if not is_known(sample.result.request_id):
                    shard.append(sample.data, sample.result)
        if not shard.results:
            shard.discard()
            return []
        shard.close()
        return list(shard.results.values())

    def _is_whole(self, endings: Sequence[str]) -> bool:
        """Tell whether a sample, written in one go as image or clip, .wav, .json, .txt, is all
        there."""
        if not self._config.strip_metadata:
            return endings[-1] == "txt"
        # A silent clip has no sound to end with: it looks as if it was cut, and is made again.
        return "wav" in endings or not (self._config.wav and is_clip(f".{endings[0]}"))

    @contextmanager
    def _local_copy(self, name: str) -> Iterator[Path]:
        path = self._storage.local_path(name)
        if path is not None:
            yield path
            return
        with tempfile.NamedTemporaryFile(prefix="raydiff-", suffix=".tar") as file:
            with self._storage.open_input(name) as source:
                shutil.copyfileobj(source, file)
            file.flush()
            yield Path(file.name)

    def _remove_temporaries(self) -> None:
        names = self._storage.list_names(TEMPORARY_DIR)
        self._storage.delete(f"{TEMPORARY_DIR}/{name}" for name in names)


class _Encoded(NamedTuple):
    """The files of a sample, but for those that tell of it."""

    ending: str
    media: bytes
    wav: bytes | None = None
    duration_s: float | None = None
    audio_sample_rate: int | None = None


def is_temporary(file_name: str | None) -> bool:
    """Tell whether a result's file is a shard that has no number yet."""
    return file_name is not None and file_name.startswith(f"{TEMPORARY_DIR}/")


def _owner(worker_id: str) -> str:
    """Return the part of a temporary shard's name before the first dot."""
    return re.sub(r"[^\w-]", "-", worker_id)


def _texts(request: RenderRequest, result: RenderResult) -> dict[str, bytes]:
    told = {name: getattr(result, name) for name in (*HASHES, *TOLD_IN_SAMPLES)}
    known = {name: value for name, value in told.items() if value is not None}
    values = {**request_metadata(request), **known}
    return {"json": json_bytes(values), "txt": text_bytes(request.prompt)}


@contextmanager
def _disk_errors(storage: Storage, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(storage.describe(name), error) from error
