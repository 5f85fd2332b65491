"""Samples in a tar, as WebDataset has them: members next to one another whose names are equal up
to the first dot. A sample here is an image or a clip, maybe its sound, `.json` and `.txt`.

The headers say nothing of when, where or by whom, so equal samples are equal bytes.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff.errors import OutputError
from raydiff.output.media_store import REQUEST_ID

BLOCK_BYTES = tarfile.BLOCKSIZE
END_OF_TAR = bytes(2 * BLOCK_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A whole sample that stands in a tar. `member` is its image or clip."""

    key: str
    member: str
    offset: int
    size_bytes: int
    start: int
    """Where its first header begins."""
    end: int
    """Where the next sample begins."""
    others: dict[str, tuple[int, int]]
    """Offset and size of its .wav, .json and .txt, by that ending."""


def sample_bytes(key: str, ending: str, media: bytes, others: Mapping[str, bytes]) -> bytes:
    """Return a sample as it stands in a tar: its image or clip, then the others by their ending.

    The media's bytes begin at BLOCK_BYTES. Raises OutputError for a key that is not a request_id:
    nothing else may choose a name in the archive.
    """
    if not REQUEST_ID.fullmatch(key):
        raise OutputError(f"request_id is {key!r}; a name in an archive needs 32 hex digits")
    blocks = [_member(f"{key}.{ending}", media)]
    blocks += [_member(f"{key}.{name}", data) for name, data in others.items()]
    return b"".join(blocks)


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Return values as one line of JSON; a lone surrogate of a prompt becomes its escape."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def text_bytes(text: str) -> bytes:
    """Return text as UTF-8, what is not UTF-8 in it escaped."""
    return text.encode("utf-8", "backslashreplace")


def read_samples(path: Path, is_whole: Callable[[Sequence[str]], bool]) -> Iterator[Sample]:
    """Yield the samples of a tar up to where it ends or was cut, if they are whole, which
    `is_whole` says of the endings of their members."""
    for members in _groups(path):
        if is_whole([_ending(member) for member in members]):
            yield _sample(members)


def read_member_header(header: bytes) -> tuple[str, int] | None:
    """Return a member's name and bytes, None if this is no header."""
    try:
        info = tarfile.TarInfo.frombuf(header, "ascii", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info.name, info.size


def next_member(offset: int, size_bytes: int) -> int:
    """Return where the bytes of the member after one begin."""
    return offset + _padded(size_bytes) + BLOCK_BYTES


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + data + bytes(-len(data) % BLOCK_BYTES)


def _groups(path: Path) -> Iterator[list[tarfile.TarInfo]]:
    """Yield the members of each sample; a member that is cut ends it."""
    group: list[tarfile.TarInfo] = []
    for member in _members(path):
        if group and _key(member) != _key(group[0]):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                is_named = REQUEST_ID.fullmatch(_key(member))
                if not is_named or not member.isreg() or _end(member) > size:
                    return
                yield member
    except tarfile.TarError:
        return


def _key(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[0]


def _ending(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[2]


def _end(member: tarfile.TarInfo) -> int:
    return member.offset_data + _padded(member.size)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _sample(members: list[tarfile.TarInfo]) -> Sample:
    media = members[0]
    return Sample(
        key=_key(media),
        member=media.name,
        offset=media.offset_data,
        size_bytes=media.size,
        start=media.offset,
        end=_end(members[-1]),
        others={_ending(member): (member.offset_data, member.size) for member in members[1:]},
    )
