"""Rows and requests as 64-bit integers, so that millions of them fit in memory and sort fast."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

IMAGE_BITS = np.uint64(12)
"""num_images is at most 4096."""
IMAGE_MASK = np.uint64(4095)


def row_key(row_index: int, image_index: int) -> int:
    """Return an image of a row as one integer that sorts like (row_index, image_index)."""
    return row_index << int(IMAGE_BITS) | image_index


def request_key(request_id: str) -> int:
    """Return the first 64 bits of a request_id: all but sure to tell it from any other."""
    return int(request_id[:16], 16)


def row_keys(table: pa.Table) -> Keys:
    """Return row_index and image_index of each row as `row_key` does."""
    return image_keys(table["row_index"].to_numpy(), table["image_index"].to_numpy())


def image_keys(row_index: NDArray[Any], image_index: NDArray[Any]) -> Keys:
    """Return images of rows as `row_key` does."""
    return row_index.astype(np.uint64) << IMAGE_BITS | image_index.astype(np.uint64)


def request_keys(request_ids: pa.ChunkedArray) -> tuple[Keys, NDArray[np.int64]]:
    """Return the first 64 bits of each request_id that is not null, and its place in the column.

    Raises ArrowInvalid if one has not 32 digits.
    """
    places = np.flatnonzero(request_ids.is_valid().to_numpy())
    digits = request_ids.drop_null().cast(pa.binary()).cast(pa.binary(32)).combine_chunks()
    if not len(places):
        return np.empty(0, np.uint64), places
    raw = np.frombuffer(digits.buffers()[1], np.uint8, 32 * len(places), 32 * digits.offset)
    halves = raw.reshape(-1, 32)[:, :16].copy().view(">u8").astype(np.uint64)
    return _parse_hex(halves[:, 0]) << np.uint64(32) | _parse_hex(halves[:, 1]), places


def _parse_hex(text: Keys) -> Keys:
    """Turn eight ASCII hex digits, packed in an integer, into the 32-bit number they write."""
    digits: Keys = (text & 0x0F0F0F0F0F0F0F0F) + 9 * (text >> np.uint64(6) & 0x0101010101010101)
    digits |= digits >> np.uint64(4)
    digits &= np.uint64(0x00FF00FF00FF00FF)
    digits |= digits >> np.uint64(8)
    digits &= np.uint64(0x0000FFFF0000FFFF)
    return (digits | digits >> np.uint64(16)) & np.uint64(0x00000000FFFFFFFF)


def num_leading_rows(keys: Keys) -> int:
    """Count the rows 0, 1, 2, ... whose image 0 is among `keys`."""
    is_first_image = (keys & IMAGE_MASK) == 0
    rows = np.sort(keys[is_first_image] >> IMAGE_BITS)
    gaps = np.flatnonzero(rows != np.arange(len(rows), dtype=np.uint64))
    return int(gaps[0]) if len(gaps) else len(rows)
