"""The image or video of a metadata row: a file of its own or a member of a shard, in a local folder
or an object store."""

import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from raydiff.errors import OutputError
from raydiff.output.shards.samples import BLOCK_BYTES, next_member, read_member_header
from raydiff.output.storage import Storage, open_storage

MEDIA_COLUMNS = ("file_name", "size_bytes", "member", "offset")
"""What a row says of where its image lies; `member` and `offset` are null for a file of its own,
and absent in the metadata of old versions."""
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov")
FRAMES_INDEX = "frames.json"
"""What a row names of a clip that is a folder of frames."""
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, ".gif", ".json")

Row = Mapping[str, Any]


class MediaError(OutputError):
    """A file of a run is missing, or not what its name says."""

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


def media_name(row: Row) -> str:
    """Return the name of a row's image: its ending says what it is."""
    return str(row.get("member") or row["file_name"])


def describe_media(row: Row) -> str | None:
    """Return the name of a row's file, with that of the image in it where it is a shard; None for
    a row that has none."""
    file_name: str | None = row["file_name"]
    member = row.get("member")
    return file_name if member is None else f"{file_name}:{member}"


def is_video(name: str) -> bool:
    """Tell a video from an image by its name; a GIF is the latter, as browsers and datasets see
    it."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def is_frames_index(name: str) -> bool:
    """Tell the index of a folder of frames by its name."""
    return name.endswith(f"/{FRAMES_INDEX}")


def is_clip(name: str) -> bool:
    """Tell what has frames from an image by its name."""
    return name.lower().endswith(CLIP_SUFFIXES)


def read_media(out: str | Path | Storage, row: Row) -> bytes:
    """Return the bytes of a row's image or video. Raises MediaError."""
    with open_media(out, row) as file:
        try:
            return file.read()
        except OSError as error:
            raise _unreadable(error) from None


def open_media(out: str | Path | Storage, row: Row) -> BinaryIO:
    """Open a row's image or video, seekable. Raises MediaError.

    A member of a shard, and what lies in an object store, is read at once.
    """
    storage = open_storage(out)
    name = _checked_name(storage, row)
    try:
        if row.get("member") is not None:
            return io.BytesIO(_read_member(storage, name, row))
        path = storage.local_path(name)
        return path.open("rb") if path is not None else io.BytesIO(storage.read(name))
    except FileNotFoundError:
        raise _missing(row) from None
    except OSError as error:
        raise _unreadable(error) from None


def check_media(out: str | Path | Storage, row: Row) -> None:
    """Raise MediaError if a row's image is not there with the size that the row says."""
    storage = open_storage(out)
    name = _checked_name(storage, row)
    try:
        size = storage.size(name)
        if size is not None and row.get("member") is not None:
            _read_header(storage, name, row)
            size = min(max(size - row["offset"], 0), row["size_bytes"])
    except OSError as error:
        raise _unreadable(error) from None
    if size is None:
        raise _missing(row)
    if size != row["size_bytes"]:
        raise MediaError(f"it has {size:,} bytes; the metadata says {row['size_bytes']:,}")


def next_in_shard(out: str | Path | Storage, row: Row, member: str) -> dict[str, Any]:
    """Return the file of that name which follows a row's image or clip in its shard, as a row of
    its own. Raises MediaError where another one does."""
    storage = open_storage(out)
    name = _checked_name(storage, row)
    following = {
        "file_name": row["file_name"],
        "member": member,
        "offset": next_member(row["offset"], row["size_bytes"]),
    }
    try:
        return {**following, "size_bytes": _read_header(storage, name, following)}
    except FileNotFoundError:
        raise _missing(row) from None
    except OSError as error:
        raise _unreadable(error) from None


def _checked_name(storage: Storage, row: Row) -> str:
    """Return the name of a row's file, once it is sure to lie in the run."""
    name = str(row["file_name"])
    pure = PurePosixPath(name)
    leads_out = pure.is_absolute() or ".." in pure.parts
    path, folder = storage.local_path(name), storage.local_path("")
    if path is not None and folder is not None:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    if leads_out:
        raise MediaError("the file name leads out of the run's folder")
    return name


def _read_member(storage: Storage, name: str, row: Row) -> bytes:
    """Return a member's bytes, once the header before them names it."""
    start, num_bytes = row["offset"] - BLOCK_BYTES, BLOCK_BYTES + row["size_bytes"]
    data = storage.read_range(name, start, num_bytes)
    _check_member(data[:BLOCK_BYTES], row)
    if len(data) < num_bytes:
        found = max(len(data) - BLOCK_BYTES, 0)
        raise MediaError(f"it has {found:,} bytes; the metadata says {row['size_bytes']:,}")
    return data[BLOCK_BYTES:]


def _read_header(storage: Storage, name: str, row: Row) -> int:
    return _check_member(storage.read_range(name, row["offset"] - BLOCK_BYTES, BLOCK_BYTES), row)


def _check_member(header: bytes, row: Row) -> int:
    """Return the member's bytes in all, once its header is sure to be this one."""
    found = read_member_header(header)
    if found is None or found[0] != row["member"]:
        raise MediaError(f"the shard does not have it at byte {row['offset']:,}")
    return found[1]


def _missing(row: Row) -> MediaError:
    what = "file" if row.get("member") is None else "shard"
    return MediaError(f"the {what} is missing", is_missing=True)


def _unreadable(error: OSError) -> MediaError:
    return MediaError(f"cannot be read: {error.strerror or error}")
