"""Init images: found inside the input root, opened once to see that they decode, and hashed;
opened again, as strictly, where they are rendered."""

import hashlib
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from raydiff.errors import ManifestError, RowError
from raydiff.manifest.schema import quoted
from raydiff.object_storage import ObjectStorage, StorageError, is_object_uri, split_uri

if TYPE_CHECKING:
    from PIL import Image

ImageFile = BufferedReader | BytesIO
FORMATS = ("PNG", "JPEG", "WEBP")
REMEMBERED_IMAGES = 16384
MAX_OBJECT_BYTES = 256 * 2**20
NUM_KEPT_OBJECTS = 16
"""Images from object stores held in memory: rows that share one tend to be neighbours."""


def find_init_image(text: str, root: Path | str | None) -> tuple[str, str]:
    """Return the absolute path of the image `text` names, relative to `root`, and its SHA-256.

    `root` is a local folder or the URI of one in an object store; then so is the path. Raises
    RowError if it lies outside `root` (links followed), is missing, too large or damaged.
    """
    if isinstance(root, str) and is_object_uri(root):
        return _find_object(text, root)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|.*,)", text):
        raise RowError(
            f"init_image is the URL {quoted(text)}; URLs are not fetched. "
            "Download it and give the file's path."
        )
    if root is None:
        raise RowError(
            f"init_image is {quoted(text)} and the manifest is not in a folder. "
            "Say which folder it lies in: --set input.root=FOLDER."
        )
    try:
        root = Path(root).resolve(strict=True)
        path = (root / text).resolve(strict=True)
        status = path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # NUL in a name, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"init_image {quoted(text)} in {root}: {reason}. Check the path.") from None
    if not path.is_relative_to(root):
        raise RowError(
            f"init_image {quoted(text)} is {path}, outside the input root {root}. "
            "Move it there or choose a wider root: --set input.root=FOLDER."
        )
    if not stat.S_ISREG(status.st_mode):
        raise RowError(f"init_image {quoted(text)} is not a file. Name a PNG, JPEG or WebP file.")
    return str(path), _checked_sha256(str(path), status.st_size, status.st_mtime_ns)


def _find_object(text: str, root: str) -> tuple[str, str]:
    root = root.rstrip("/")
    name = text.removeprefix(f"{root}/")
    if "://" in name or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise RowError(
            f"init_image {quoted(text)} is not a name below the input root {root}. "
            "Move it there or choose another root: --set input.root=URI."
        )
    uri = f"{root}/{name}"
    return uri, _checked_object_sha256(uri)


@lru_cache(maxsize=REMEMBERED_IMAGES)
def _checked_object_sha256(uri: str) -> str:
    """Decode the image and hash the object. It is taken not to change while a run is read."""
    with _opened(uri) as file:
        _decode(file)
        return hashlib.sha256(_object_bytes(uri)).hexdigest()


@lru_cache(maxsize=NUM_KEPT_OBJECTS)
def _object_bytes(uri: str) -> bytes:
    bucket, name = split_uri(uri)
    scheme = uri.partition("://")[0]
    try:
        data = _bucket(f"{scheme}://{bucket}").read_range(name, 0, MAX_OBJECT_BYTES + 1)
    except StorageError as error:
        if error.is_outage:
            raise ManifestError(f"init_image {error}") from None
        raise RowError(f"init_image {error}") from None
    if len(data) > MAX_OBJECT_BYTES:
        raise RowError(f"init_image {uri} has more than {MAX_OBJECT_BYTES:,} bytes. Scale it down.")
    return data


def forget_objects() -> None:
    """Read images in object stores anew from here on: a run begins."""
    _checked_object_sha256.cache_clear()
    _object_bytes.cache_clear()


@lru_cache(maxsize=8)
def _bucket(uri: str) -> ObjectStorage:
    # Manifest or output come from the store as a rule: an outage is waited out.
    return ObjectStorage(uri, has_answered=True)


@lru_cache(maxsize=REMEMBERED_IMAGES)
def _checked_sha256(path: str, size_bytes: int, mtime_ns: int) -> str:
    """Decode the image and hash its file; size and time are there as keys of the cache."""
    with _opened(path) as file:
        _decode(file)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_init_image(path: str) -> "Image.Image":
    """Return the image at `path`, found and checked before, as RGB.

    Raises RowError where it is gone by now, too large or damaged.
    """
    with _opened(path) as file:
        return _decode(file)


def _decode(file: ImageFile) -> "Image.Image":
    from PIL import Image  # a plain manifest needs no Pillow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            return image.convert("RGB")


@contextmanager
def _opened(path: str) -> Iterator[ImageFile]:
    """Open the file; what is wrong with it, or with the image in it, is a RowError."""
    from PIL import Image

    try:
        with BytesIO(_object_bytes(path)) if is_object_uri(path) else Path(path).open("rb") as file:
            yield file
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowError(
            f"init_image {path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels. Scale it down."
        ) from None
    except (FileNotFoundError, PermissionError) as error:
        raise RowError(f"init_image {path}: {error.strerror}. Make it readable.") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise RowError(
            f"init_image {path} is not an intact PNG, JPEG or WebP image: {error}. Replace it."
        ) from None
