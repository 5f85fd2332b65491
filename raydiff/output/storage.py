"""Where a run's files lie: a local folder or an object store, behind one interface."""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, Self, TypeVar

import pyarrow as pa

from raydiff.errors import OutputError
from raydiff.object_storage import ObjectStorage, Patience, StorageError, StoredFile, is_uri
from raydiff.output.atomic import replace_file, sync_folder

T = TypeVar("T")


class Storage(Protocol):
    """Files below one place, by names relative to it, `/` separated.

    Methods raise OSError as local files do, FileNotFoundError for what is not there; an object
    store's other errors are StorageError, which says what to do.
    """

    @property
    def uri(self) -> str:
        """The place as it is named to people: an absolute path, or a URI."""

    def describe(self, name: str) -> str:
        """Return the path or URI of a name, for messages."""

    def local_path(self, name: str) -> Path | None:
        """Return the path of a name, None where it is not a local file."""

    def folder(self, name: str) -> Self:
        """Return the storage of the files below `name`; nothing needs to be there."""

    def read(self, name: str) -> bytes:
        """Return a whole file."""

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Return `num_bytes` from `start` on, fewer at the file's end."""

    def open_input(self, name: str, size_bytes: int | None = None) -> pa.NativeFile:
        """Return a seekable file to read; a known size saves a request."""

    def size(self, name: str) -> int | None:
        """Return a file's bytes, None if there is none."""

    def list_files(self, folder: str = "") -> Iterator[StoredFile]:
        """Yield every file below a folder, at any depth; none where there is no folder."""

    def list_names(self, folder: str = "") -> list[str]:
        """Return the names of the files and folders right in a folder, sorted."""

    def put(
        self,
        name: str,
        data: bytes,
        *,
        is_durable: bool = True,
        fence: Callable[[], None] | None = None,
    ) -> None:
        """Write a file in one step: whole or not at all, over what is there.

        A durable one survives a power loss. `fence` is called before each attempt to write; what
        it raises ends the operation.
        """

    def put_file(self, name: str, path: Path) -> None:
        """Write a file, durable, with the content of a local one, which stays."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of that name; return whether it was written."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are passed over."""

    def move(self, name: str, to: str) -> None:
        """Give a file another name, over what is there."""


class LocalStorage:
    """The files in a local folder. Folders below it are made as needed, never the folder itself."""

    def __init__(self, path: str | Path) -> None:
        self._path = self._root = Path(path).expanduser().absolute()

    @property
    def uri(self) -> str:
        """The folder's absolute path."""
        return str(self._path)

    def describe(self, name: str) -> str:
        return str(self._path / name)

    def local_path(self, name: str) -> Path | None:
        return self._path / name

    def folder(self, name: str) -> Self:
        inner = type(self)(self._path / name)
        inner._root = self._root
        return inner

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        with (self._path / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), num_bytes, start)

    def open_input(self, name: str, size_bytes: int | None = None) -> pa.NativeFile:
        return pa.OSFile(str(self._path / name))

    def size(self, name: str) -> int | None:
        try:
            status = (self._path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if stat.S_ISDIR(status.st_mode) else status.st_size

    def list_files(self, folder: str = "") -> Iterator[StoredFile]:
        for entry in _scan(self._path / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                yield from self.list_files(name)
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # Removed since it was listed.
            yield StoredFile(name, status.st_size, status.st_mtime)

    def list_names(self, folder: str = "") -> list[str]:
        return [entry.name for entry in _scan(self._path / folder)]

    def put(
        self,
        name: str,
        data: bytes,
        *,
        is_durable: bool = True,
        fence: Callable[[], None] | None = None,
    ) -> None:
        if fence is not None:
            fence()
        self._in_folder(name, lambda path: replace_file(path, data, is_durable=is_durable))

    def put_file(self, name: str, path: Path) -> None:
        self._in_folder(name, lambda target: _copy_whole(path, target))

    def create(self, name: str, data: bytes) -> bool:
        return self._in_folder(name, lambda path: _create(path, data))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self._path / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        self._in_folder(to, lambda path: (self._path / name).replace(path))

    def _in_folder(self, name: str, write: Callable[[Path], T]) -> T:
        """Call `write` with the path of a name, once more if its folder was not there: by now
        another thread may have made it."""
        path = self._path / name
        try:
            return write(path)
        except FileNotFoundError:
            if not self._root.is_dir():
                raise
            path.parent.mkdir(parents=True, exist_ok=True)
            return write(path)


def open_storage(
    place: str | Path | Storage, *, patience: Patience | None = None, has_answered: bool = False
) -> Storage:
    """Open a local path or the URI of an object store; an opened one is returned as it is.

    Makes no request. `has_answered` says that a store is known to work, so that an outage is
    waited out from the start. Raises ConfigError for a URI that cannot be used.
    """
    if not isinstance(place, str | Path):
        return place
    if is_uri(place):
        return ObjectStorage(str(place), patience=patience, has_answered=has_answered)
    return LocalStorage(place)


def read_error(uri: str, error: OSError) -> OutputError:
    """Return the OutputError for what could not be read at `uri`."""
    if isinstance(error, StorageError):
        return OutputError(f"{error.uri}: cannot be read: {error.reason}. {error.remedy}.")
    return OutputError(f"{uri}: cannot be read: {error.strerror}. Make it readable and try again.")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _copy_whole(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with source.open("rb") as file, temporary.open("wb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _create(path: Path, data: bytes) -> bool:
    """Write `path` whole if nothing is there: a link fails where a rename would replace."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True
