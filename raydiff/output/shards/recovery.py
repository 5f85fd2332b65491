"""What is in a shard that has no index: one whose process was killed, or whose index was lost."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raydiff.output.shards.samples import Sample, read_samples
from raydiff.request import RenderResult

HASHES = ("sha256", "wav_sha256")
TOLD_IN_SAMPLES = (
    *("profile", "dtype", "batch_size", "device", "num_threads", "warning"),
    *("duration_s", "audio_sample_rate", "nfe"),
)
"""What a sample's .json says of its result, beside HASHES: what has to do with its pixels."""


class FoundSample(NamedTuple):
    """A whole sample, as bytes of the tar, and the result that it is of."""

    data: bytes
    result: RenderResult


def find_samples(path: Path, is_whole: Callable[[Sequence[str]], bool]) -> Iterator[FoundSample]:
    """Yield the whole samples of a tar that are what they were; see `read_samples`.

    A sample whose image or sound does not have the sha256 that its .json says is passed over.
    """
    finished_at = path.stat().st_mtime
    with path.open("rb") as file:
        for sample in read_samples(path, is_whole):
            file.seek(sample.start)
            data = file.read(sample.end - sample.start)
            hashes = _hashes(data, sample)
            told = _told(data, sample)
            if told is None or any(told.get(name, one) != one for name, one in hashes.items()):
                continue
            result = RenderResult(
                request_id=sample.key,
                status="completed",
                **hashes,
                size_bytes=sample.size_bytes,
                member=sample.member,
                offset=sample.offset,
                finished_at=finished_at,
                **{name: told.get(name) for name in TOLD_IN_SAMPLES},
            )
            yield FoundSample(data, result)


def _hashes(data: bytes, sample: Sample) -> dict[str, Any]:
    """Return HASHES of what is there."""
    places = {"sha256": (sample.offset, sample.size_bytes), "wav_sha256": sample.others.get("wav")}
    return {
        name: hashlib.sha256(_slice(data, sample, *place)).hexdigest()
        for name, place in places.items()
        if place is not None
    }


def _told(data: bytes, sample: Sample) -> dict[str, Any] | None:
    """Return what a sample's .json says, nothing if it has none; None if that is damaged."""
    if "json" not in sample.others:
        return {}
    try:
        values = json.loads(_slice(data, sample, *sample.others["json"]))
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _slice(data: bytes, sample: Sample, offset: int, size: int) -> bytes:
    return data[offset - sample.start :][:size]
