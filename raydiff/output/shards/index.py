"""The index of one shard, OUT/shards/000000.json: what became of the request of each sample, and
where its image lies in the tar. One sample a line, so that the first line alone says what is in it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from raydiff.errors import OutputError
from raydiff.output.shards.samples import json_bytes
from raydiff.request import RenderResult

SHARDS_DIR = "shards"
VERSION = 1
HEADER_BYTES = 4096
NOT_INDEXED = {"file_name", "status"}
"""A shard's name is that of its index, and what is in it is completed."""
INDEXED_FIELDS = tuple(one.name for one in fields(RenderResult) if one.name not in NOT_INDEXED)


class DamagedIndexError(OutputError):
    """An index is not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardHeader:
    """What the first line of an index says."""

    num_samples: int
    size_bytes: int
    """Of the tar."""
    sha256: str
    """Of the tar."""
    written_as: str
    """Name of the temporary shard that this one was."""
    first: str
    """request_id of the first sample."""
    last: str


def shard_name(number: int) -> str:
    """Return the name of a published shard: `shards/000000.tar`."""
    return f"{SHARDS_DIR}/{number:06d}.tar"


def index_name(number: int) -> str:
    """Return the name of a shard's index: `shards/000000.json`."""
    return f"{SHARDS_DIR}/{number:06d}.json"


def index_bytes(header: ShardHeader, results: Sequence[RenderResult]) -> bytes:
    """Return an index as the bytes of its file."""
    head = {"version": VERSION, **{one.name: getattr(header, one.name) for one in fields(header)}}
    lines = [json_bytes(_indexed(result)) for result in results]
    return json_bytes(head)[:-1] + b',"samples":[\n' + b",\n".join(lines) + b"\n]}\n"


def read_header(data: bytes) -> ShardHeader:
    """Read an index's first line, which HEADER_BYTES hold. Raises DamagedIndexError."""
    return _header(_parsed(data.partition(b"\n")[0] + b"]}"))


def read_index(data: bytes, number: int) -> list[RenderResult]:
    """Return the results in an index, as those of shard `number`. Raises DamagedIndexError."""
    values = _parsed(data)
    _header(values)
    try:
        return [
            RenderResult(
                **{name: sample[name] for name in INDEXED_FIELDS if name in sample},
                status="completed",
                file_name=shard_name(number),
            )
            for sample in values["samples"]
        ]
    except (KeyError, TypeError) as error:
        raise DamagedIndexError(f"not the index of a shard: {error}") from error


def _indexed(result: RenderResult) -> dict[str, Any]:
    values = ((name, getattr(result, name)) for name in INDEXED_FIELDS)
    return {name: value for name, value in values if value is not None}


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise DamagedIndexError(f"not the index of a shard: {error}") from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise DamagedIndexError(f"not the index of a shard, version {VERSION}")
    return values


def _header(values: dict[str, Any]) -> ShardHeader:
    try:
        return ShardHeader(**{one.name: values[one.name] for one in fields(ShardHeader)})
    except KeyError as error:
        raise DamagedIndexError(f"not the index of a shard: it lacks {error}") from error
