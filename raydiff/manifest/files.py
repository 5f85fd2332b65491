"""Find the files that a manifest's path, folder, glob or URI means, on any storage."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from raydiff.errors import ManifestError
from raydiff.object_storage import ObjectStorage, is_object_uri, split_uri

PARQUET_SUFFIXES = (".parquet", ".pq")


def find_files(uri: str) -> tuple[Any, str, list[str]]:
    """Return the filesystem, the folder that names start from, and the sorted files of `uri`.

    Raises ManifestError if there is no file, OSError if the storage cannot be asked.
    """
    stem, pattern = _split_glob(uri)
    filesystem, path = _open_filesystem(stem)
    info = filesystem.get_file_info(path)
    if pattern:
        matches = re.compile(_glob_regex(pattern)).fullmatch
        recursive = "/" in pattern
        paths = [p for p in _list(filesystem, path, recursive) if matches(relative_name(p, path))]
        if not paths:
            raise ManifestError(f"manifest {uri} matches no file. Check the pattern.")
        return filesystem, path, paths
    if info.type == pafs.FileType.Directory:
        files = _list(filesystem, path, recursive=True)
        paths = [p for p in files if p.endswith(PARQUET_SUFFIXES)]
        if not paths:
            found = f"it has {len(files)} other files, e.g. {files[0]}" if files else "it is empty"
            raise ManifestError(
                f"manifest {uri} is a folder without .parquet files: {found}. "
                "Name a Parquet file, a folder of them or a glob."
            )
        return filesystem, path, paths
    if info.type == pafs.FileType.NotFound:
        raise ManifestError(f"manifest {uri} does not exist ({path}). Check the path.")
    return filesystem, path.rpartition("/")[0] or "/", [path]


def _split_glob(uri: str) -> tuple[str, str]:
    """Split a glob into its plain folder and its pattern; the pattern is "" where there is none.

    In a URI `?` begins the options (`?region=eu-west-1`), so only `*` and `[` make a glob there.
    """
    scheme, is_uri, rest = uri.rpartition("://")
    if not is_uri and Path(uri).exists():
        return uri, ""
    body, mark, options = rest.partition("?") if is_uri else (rest, "", "")
    special = re.search(r"[*\[]" if is_uri else r"[*?\[]", body)
    if not special:
        return uri, ""
    cut = body.rfind("/", 0, special.start()) + 1
    folder = body[:cut].rstrip("/") or ("/" if cut else "" if is_uri else ".")
    return scheme + is_uri + folder + mark + options, body[cut:]


def _glob_regex(pattern: str) -> str:
    """Translate a glob: `*` and `?` stay within a folder, `**/` is any number of folders."""
    tokens = {"**/": "(?:.+/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return "".join(
        tokens.get(part) or (part.replace("[!", "[^") if part[:1] == "[" else re.escape(part))
        for part in parts
    )


def _open_filesystem(uri: str) -> tuple[Any, str]:
    """Return the filesystem of a path or URI, and the path in it."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), Path(uri).expanduser().absolute().as_posix()
    if is_object_uri(uri):
        return ObjectFiles(uri), "/".join(split_uri(uri)).rstrip("/")
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        try:
            import fsspec
        except ImportError:
            raise ManifestError(
                f"manifest {uri}: {error}. `pip install fsspec` opens more kinds of storage."
            ) from None
        try:
            inner, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as problem:
            raise ManifestError(f"manifest {uri} cannot be opened: {problem}") from None
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(inner))
    return filesystem, path


class ObjectFiles:
    """What is asked of a filesystem here, for one bucket. Paths begin with the bucket's name.

    pyarrow's own filesystems know neither the patience nor the settings of ObjectStorage.
    """

    def __init__(self, uri: str) -> None:
        self.scheme = uri.partition("://")[0].lower()
        self._bucket, _ = split_uri(uri)
        self._storage = ObjectStorage(f"{self.scheme}://{self._bucket}")

    def get_file_info(self, what: Any) -> Any:
        """Return the info of a path, or of all files that a selector finds."""
        if isinstance(what, pafs.FileSelector):
            infos = (
                pafs.FileInfo(f"{self._bucket}/{file.name}", pafs.FileType.File)
                for file in self._storage.list_files(self._name(what.base_dir))
            )
            depth = what.base_dir.rstrip("/").count("/") + 1
            return [info for info in infos if what.recursive or info.path.count("/") == depth]
        if self._name(what) and self._storage.size(self._name(what)) is not None:
            return pafs.FileInfo(what, pafs.FileType.File)
        is_folder = next(self._storage.list_files(self._name(what)), None) is not None
        return pafs.FileInfo(what, pafs.FileType.Directory if is_folder else pafs.FileType.NotFound)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open an object to read, with seeks."""
        return self._storage.open_input(self._name(path))

    open_input_stream = open_input_file

    def _name(self, path: str) -> str:
        return path.removeprefix(self._bucket).strip("/")


def init_image_folder(filesystem: Any, folder: str) -> Path | str | None:
    """Return the folder that a manifest's init images start from, None on other storage."""
    if isinstance(filesystem, ObjectFiles):
        return f"{filesystem.scheme}://{folder}"
    return Path(folder) if isinstance(filesystem, pafs.LocalFileSystem) else None


def _list(filesystem: Any, folder: str, recursive: bool) -> list[str]:
    """List the files below a folder by name, less hidden ones and writers' own (_SUCCESS)."""
    selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
    return sorted(
        info.path
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File
        and not any(part[0] in "._" for part in relative_name(info.path, folder).split("/"))
    )


def relative_name(path: str, folder: str) -> str:
    """Return the path below its folder, `/` separated."""
    return path.removeprefix(folder).lstrip("/")
