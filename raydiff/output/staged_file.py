"""A large file that is written piece by piece and appears under its name whole, or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Self

from raydiff.output.atomic import sync_folder
from raydiff.output.storage import Storage


class StagedFile:
    """Write to `path`, then `publish`; left without that, nothing remains. Raises OSError.

    In a local folder it is written beside its name, for an object store on this machine.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._target = storage.local_path(name)
        if self._target is None:
            descriptor, path = tempfile.mkstemp(prefix="raydiff-")
            os.close(descriptor)
            self.path = Path(path)
        else:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self.path = self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")

    def publish(self) -> int:
        """Give the file its name, durable, and return its size."""
        size_bytes = self.path.stat().st_size
        if self._target is None:
            self._storage.put_file(self._name, self.path)
            return size_bytes
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.replace(self._target)
        sync_folder(self._target.parent)
        return size_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
