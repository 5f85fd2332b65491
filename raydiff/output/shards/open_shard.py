"""A shard that is being written: a tar of samples under a temporary name, then its index."""

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from raydiff.output.shards.index import ShardHeader, index_bytes
from raydiff.output.shards.samples import BLOCK_BYTES, END_OF_TAR
from raydiff.output.storage import Storage
from raydiff.request import RenderResult


class OpenShard:
    """The tar is written in place where the output is a local folder, else beside the process and
    sent when it is closed.

    A sample is written in one go behind the last whole one: what a full disk or a killed process
    leaves is whole samples and maybe a piece. Methods raise OSError; they are not for several
    threads at once.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        self.results: dict[str, RenderResult] = {}
        """By request_id, in the order of the samples; `file_name` is the temporary name."""
        self._storage = storage
        local = storage.local_path(name)
        self._is_sent = local is None
        if local is None:
            self._descriptor, path = tempfile.mkstemp(prefix="raydiff-", suffix=".tar")
            self._path = Path(path)
        else:
            _make_folder(local.parent)
            self._path = local
            self._descriptor = os.open(local, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        self._digest = hashlib.sha256()
        self._end = 0
        self._lost: OSError | None = None

    def append(self, sample: bytes, result: RenderResult) -> None:
        """Add a sample, its image first; one whose request is in the shard already is left out."""
        if result.request_id in self.results:
            return
        _write_at(self._descriptor, sample, self._end)
        self._digest.update(sample)
        self.results[result.request_id] = replace(
            result, file_name=self.name, offset=self._end + BLOCK_BYTES
        )
        self._end += len(sample)

    def close(self) -> None:
        """Make tar and index durable. If this fails it may be called again."""
        size_bytes = self._end + len(END_OF_TAR)
        _write_at(self._descriptor, END_OF_TAR, self._end)
        os.ftruncate(self._descriptor, size_bytes)
        self._sync()
        digest = self._digest.copy()
        digest.update(END_OF_TAR)
        ids = list(self.results)
        header = ShardHeader(
            num_samples=len(ids),
            size_bytes=size_bytes,
            sha256=digest.hexdigest(),
            written_as=self.name,
            first=ids[0],
            last=ids[-1],
        )
        if self._is_sent:
            self._storage.put_file(self.name, self._path)
        # Its index says of a temporary shard that it is whole.
        data = index_bytes(header, list(self.results.values()))
        self._storage.put(temporary_index(self.name), data)
        os.close(self._descriptor)
        if self._is_sent:
            self._path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the tar."""
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)

    def _sync(self) -> None:
        """Sync the tar. After a failure the disk may have lost what it took, and would not say so
        again: such a shard is never closed."""
        if self._lost is not None:
            raise self._lost
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._lost = error
            raise


def temporary_index(name: str) -> str:
    """Return the name of a temporary shard's index."""
    return name.removesuffix(".tar") + ".json"


def _make_folder(folder: Path) -> None:
    """Make the folder for temporary shards and the one for shards, never the output folder."""
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)


def _write_at(descriptor: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, start)
        view, start = view[num_written:], start + num_written
