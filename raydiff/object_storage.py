"""Object stores (s3://, gs://, az://): whole objects, read and written with bounded patience.

Credentials come from the environment alone (AWS_*, GOOGLE_*, AZURE_*), never from a URI.
"""

import errno
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import obstore
import obstore.store
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError

from raydiff.errors import ConfigError

T = TypeVar("T")

STORES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
"""Variables that name another server; one of these may be plain http://."""
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
CREDENTIAL_SERVERS = r"https?://(169\.254\.|metadata\.google)"
"""Asked where the environment has no credentials."""

CONNECT_S = 5.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
WHOLE_BYTES = 4 * 2**20
"""Objects up to this size are opened by reading them whole: one request instead of several."""
READ_BUFFER_BYTES = 2**20
PAGE_ROWS = 1000
MULTIPART_BYTES = 64 * 2**20
CHUNK_BYTES = 8 * 2**20
NUM_UPLOADS = 4
"""Chunks of one file under way at once: each has REQUEST_S to arrive, also on a slow line."""
TRANSIENT_STATUSES = {408, 409, 425, 429}
"""And every 5xx. 409 is two conditional writes at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long an operation is tried, in seconds."""

    request_s: float = 30.0
    """One request, its body included."""
    first_s: float = 20.0
    """Until the store has answered for the first time: a wrong address is told soon."""
    total_s: float = 120.0
    """From then on: an outage of a minute is waited out."""


class StorageError(OSError):
    """What an object store refused, or could not do for too long (`is_outage`). Its text names
    the object, the reason and the remedy."""

    def __init__(self, uri: str, reason: str, remedy: str, *, is_outage: bool) -> None:
        super().__init__(errno.EIO, f"{reason}. {remedy}")
        self.uri = uri
        self.is_outage = is_outage
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}. {self.remedy}."


class StoredFile(NamedTuple):
    """One file of a listing."""

    name: str
    size_bytes: int
    modified_at: float
    """Unix time by the store's clock."""


class _Connection:
    """One bucket, shared by the folders in it."""

    def __init__(self, store: Any, patience: Patience, *, has_answered: bool) -> None:
        self.store = store
        self.patience = patience
        self.has_answered = has_answered


class ObjectStorage:
    """The objects below one URI, named like files in a folder (`metadata/part-1.parquet`).

    Every method tries again after server errors, slow-downs, timeouts and lost connections, with
    pauses that grow, and raises StorageError when that does not help. Reading what is not there
    raises FileNotFoundError. May be shared by threads.
    """

    def __init__(
        self, uri: str, *, patience: Patience | None = None, has_answered: bool = False
    ) -> None:
        """Makes no request. Raises ConfigError for a URI that cannot be used.

        `has_answered` says that the store is known to work: it is waited for from the start.
        """
        bucket, self._prefix = split_uri(uri)
        self._root = f"{uri.partition('://')[0].lower()}://{bucket}"
        patience = patience or Patience()
        store = _open_store(self._root, bucket, patience)
        self._connection = _Connection(store, patience, has_answered=has_answered)

    @property
    def uri(self) -> str:
        """The URI that names start from, without a slash at its end."""
        return f"{self._root}/{self._prefix}".rstrip("/")

    def describe(self, name: str) -> str:
        """Return the full URI of a name."""
        return f"{self.uri}/{name}" if name else self.uri

    def local_path(self, name: str) -> Path | None:
        """Return None: nothing here is a local file."""
        return None

    def folder(self, name: str) -> Self:
        """Return the objects below `name`; nothing needs to be there."""
        inner = object.__new__(type(self))
        inner._root = self._root
        inner._prefix = self._key(name)
        inner._connection = self._connection
        return inner

    # -- reading -------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """Return a whole object."""

        def read() -> bytes:
            return bytes(obstore.get(self._connection.store, self._key(name)).bytes())

        return self._retried(name, read)

    def read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Return `num_bytes` from `start` on, fewer at the object's end."""

        def read() -> bytes:
            store, key = self._connection.store, self._key(name)
            return bytes(obstore.get_range(store, key, start=start, length=num_bytes))

        return self._retried(name, read)

    def open_input(self, name: str, size_bytes: int | None = None) -> pa.NativeFile:
        """Return a seekable file to read; a known size saves a request."""
        size_bytes = self._size(name) if size_bytes is None else size_bytes
        if size_bytes <= WHOLE_BYTES:
            return pa.BufferReader(self.read(name))
        raw = _RangeReader(self, name, size_bytes)
        return pa.PythonFile(io.BufferedReader(raw, READ_BUFFER_BYTES), mode="r")

    def size(self, name: str) -> int | None:
        """Return an object's bytes, None if there is none."""
        try:
            return self._size(name)
        except FileNotFoundError:
            return None

    def list_files(self, folder: str = "") -> Iterator[StoredFile]:
        """Yield every object below a folder, at any depth, by name."""
        pages = _Pages(self._connection.store, self._key(folder) or None)
        while rows := self._retried(folder, pages.read):
            for row in rows:
                yield StoredFile(
                    name=row["path"][len(self._prefix) :].lstrip("/"),
                    size_bytes=row["size"],
                    modified_at=row["last_modified"].timestamp(),
                )

    def list_names(self, folder: str = "") -> list[str]:
        """Return the names of the objects and folders right in a folder, sorted."""
        prefix = self._key(folder)
        found = self._retried(
            folder,
            lambda: obstore.list_with_delimiter(self._connection.store, prefix or None),
        )
        paths = {*found["common_prefixes"], *(row["path"] for row in found["objects"])}
        # Consoles mark an empty folder with an object of its own name.
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths - {prefix})

    # -- writing -------------------------------------------------------------------------------

    def put(
        self,
        name: str,
        data: bytes,
        *,
        is_durable: bool = True,
        fence: Callable[[], None] | None = None,
    ) -> None:
        """Write an object in one request: it is there whole or not at all.

        `fence` is called before each attempt; what it raises ends the operation. An object is
        always durable, whatever `is_durable` says.
        """

        def put() -> None:
            obstore.put(
                self._connection.store,
                self._key(name),
                data,
                use_multipart=len(data) > MULTIPART_BYTES,
                chunk_size=CHUNK_BYTES,
                max_concurrency=NUM_UPLOADS,
            )

        self._retried(name, put, fence=fence)

    def put_file(self, name: str, path: Path) -> None:
        """Write an object from a local file, in several requests if it is large."""

        def put() -> None:
            obstore.put(
                self._connection.store,
                self._key(name),
                path,
                chunk_size=CHUNK_BYTES,
                max_concurrency=NUM_UPLOADS,
            )

        self._retried(name, put)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of that name; return whether it was written.

        A store that does not know conditional writes overwrites, or raises StorageError.
        """
        is_retry = False

        def put() -> bool:
            nonlocal is_retry
            try:
                obstore.put(self._connection.store, self._key(name), data, mode="create")
            except AlreadyExistsError:
                # It may be ours, from an attempt whose answer was lost.
                return is_retry and self.read(name) == data
            finally:
                is_retry = True
            return True

        return self._retried(name, put)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are passed over."""
        for name in names:
            try:
                self._retried(
                    name,
                    lambda: obstore.delete(self._connection.store, self._key(name)),  # noqa: B023
                )
            except FileNotFoundError:
                continue

    def move(self, name: str, to: str) -> None:
        """Give an object another name, over what is there: a copy, then a removal."""
        store = self._connection.store
        self._retried(name, lambda: obstore.copy(store, self._key(name), self._key(to)))
        self.delete([name])

    # -- requests ------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".strip("/") if self._prefix else name.strip("/")

    def _size(self, name: str) -> int:
        def head() -> int:
            size_bytes: int = obstore.head(self._connection.store, self._key(name))["size"]
            return size_bytes

        return self._retried(name, head)

    def _retried(
        self, name: str, call: Callable[[], T], *, fence: Callable[[], None] | None = None
    ) -> T:
        connection = self._connection
        patience = connection.patience
        started = time.monotonic()
        pause_s = FIRST_PAUSE_S
        while True:
            if fence is not None:
                fence()
            try:
                result = call()
            except FileNotFoundError as error:
                connection.has_answered = True
                if "NoSuchBucket" in str(error):
                    raise self._refused(name, error) from None
                raise FileNotFoundError(
                    errno.ENOENT, os.strerror(errno.ENOENT), self.describe(name)
                ) from None
            except (BaseError, ValueError) as error:
                limit_s = patience.total_s if connection.has_answered else patience.first_s
                is_late = time.monotonic() - started + pause_s > limit_s
                if not _is_transient(error):
                    raise self._refused(name, error) from None
                if is_late:
                    connection.has_answered = False  # What comes next is told soon.
                    raise self._refused(name, error, is_outage=True) from None
            else:
                connection.has_answered = True
                return result
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _refused(self, name: str, error: Exception, *, is_outage: bool = False) -> StorageError:
        reason = _reason(error)
        scheme = self._root.partition("://")[0]
        remedy = "Check that the store can be reached from here, and its address"
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            remedy = f"Make the bucket, or correct its name ({self._root})"
        elif re.search(rf"status code: 40[13]\b|performing \w+ {CREDENTIAL_SERVERS}", str(error)):
            remedy = f"Set {CREDENTIALS[scheme]}, and give them access to {self._root}"
        elif re.search(r"status code: 30\d", str(error)):
            remedy = "Set AWS_REGION to the bucket's region"
        return StorageError(self.describe(name), reason, remedy, is_outage=is_outage)


class _Pages:
    """A listing, page by page, which goes on after a failure where it broke off."""

    def __init__(self, store: Any, prefix: str | None) -> None:
        self._store = store
        self._prefix = prefix
        self._last = prefix
        self._stream: Any = None

    def read(self) -> list[Any]:
        """Return the next objects, none at the end."""
        if self._stream is None:
            self._stream = obstore.list(
                self._store, self._prefix, offset=self._last, chunk_size=PAGE_ROWS
            )
        try:
            while page := next(self._stream, None):
                # What consoles mark folders with is named like one, less the slash, and would
                # come again and again.
                if rows := [row for row in page if self._last is None or row["path"] > self._last]:
                    self._last = rows[-1]["path"]
                    return rows
        except BaseError:
            self._stream = None
            raise
        return []


class _RangeReader(io.RawIOBase):
    """A seekable file over ranges of one object."""

    def __init__(self, storage: ObjectStorage, name: str, size_bytes: int) -> None:
        self._storage = storage
        self._name = name
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        self._position = max(0, start[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        num_bytes = min(len(buffer), self._size_bytes - self._position)
        if num_bytes <= 0:
            return 0
        data = self._storage.read_range(self._name, self._position, num_bytes)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def is_uri(text: str | Path) -> bool:
    """Tell a URI (`s3://...`) from a local path."""
    return isinstance(text, str) and URI.match(text) is not None


def is_object_uri(text: str | Path) -> bool:
    """Tell whether `text` names something in an object store."""
    match = URI.match(text) if isinstance(text, str) else None
    return match is not None and match["scheme"].lower() in STORES


def split_uri(uri: str) -> tuple[str, str]:
    """Return the bucket and the name in it. Raises ConfigError for a URI that cannot be used."""
    match = URI.match(uri)
    scheme = match["scheme"].lower() if match else ""
    bucket, _, prefix = (match["rest"] if match else "").partition("/")
    if scheme not in STORES:
        known = ", ".join(f"{one}://" for one in STORES)
        raise ConfigError(f"{uri}: not a kind of storage that raydiff opens. Known: {known}")
    if "@" in bucket or "?" in uri:
        shown = f"{scheme}://{bucket.rpartition('@')[2]}/{prefix}".partition("?")[0]
        raise ConfigError(
            f"{shown}: this URI was given with credentials or options in it. Name the bucket and "
            f"path alone and set {CREDENTIALS[scheme]} in the environment."
        )
    parts = [part for part in prefix.split("/") if part]
    if not bucket or {".", ".."} & set(parts):
        raise ConfigError(f"{uri}: no path in a bucket. Write it as {scheme}://BUCKET/PATH.")
    return bucket, "/".join(parts)


def _open_store(root: str, bucket: str, patience: Patience) -> Any:
    scheme = root.partition("://")[0]
    is_plain_http = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
    try:
        return getattr(obstore.store, STORES[scheme])(
            bucket,
            client_options={
                "timeout": timedelta(seconds=patience.request_s),
                "connect_timeout": timedelta(seconds=min(CONNECT_S, patience.request_s)),
                "allow_http": is_plain_http,
            },
            # Tries again in _retried instead, where a fence can be asked before each attempt.
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=patience.total_s)},
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(
            f"{root}: {_reason(error)}. Set {CREDENTIALS[scheme]} in the environment."
        ) from None


def _is_transient(error: Exception) -> bool:
    """Tell whether trying again may help: the server's trouble, or the line's."""
    if not isinstance(error, GenericError) or "builder error" in str(error):
        return False
    status = re.search(r"status code: (\d{3})", str(error))
    return status is None or status[1][0] == "5" or int(status[1]) in TRANSIENT_STATUSES


def _reason(error: Exception) -> str:
    """Say in one line what the server or the line said."""
    text = str(error).partition("\n\nDebug source")[0]
    if status := re.search(r"status code: (\d{3}[^:\n]*)", text):
        code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text) for tag in ("Code", "Message"))
        said = [found[1] for found in (code, message) if found]
        return f"{status[1].strip()} ({': '.join(said)})" if said else status[1].strip()
    if request := re.search(r"Error performing \w+ (\w+://[^/\s]+).* - (.*)", text):
        said = re.findall(r'message: "([^"]+)"', str(error))
        return f"no answer from {request[1]} ({said[-1] if said else request[2]})"
    return " ".join(text.split()).rstrip(". ")
