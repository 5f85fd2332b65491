"""Keys agree with the texts and numbers that they stand for."""

import secrets

import numpy as np
import pyarrow as pa
import pytest

from raydiff.output.keys import (
    num_leading_rows,
    request_key,
    request_keys,
    row_key,
    row_keys,
)


def test_row_keys_sort_like_row_and_image():
    rng = np.random.default_rng(1)
    rows = [*rng.integers(0, 2**50, 200).tolist(), 0, 0, 2**50]
    images = [*rng.integers(0, 4096, 200).tolist(), 0, 4095, 4095]
    table = pa.table({"row_index": rows, "image_index": pa.array(images, pa.int32())})
    keys = row_keys(table)
    assert keys.tolist() == [row_key(r, i) for r, i in zip(rows, images, strict=True)]
    assert np.argsort(keys).tolist() == sorted(range(203), key=lambda n: (rows[n], images[n]))


def test_request_keys_are_the_first_64_bits_and_skip_nulls():
    ids = [secrets.token_hex(16) if n % 3 else None for n in range(500)]
    ids[4] = "0" * 32
    ids[5] = "f" * 32
    column = pa.chunked_array([ids[:123], ids[123:]], pa.string())
    keys, places = request_keys(column)
    assert places.tolist() == [n for n, one in enumerate(ids) if one is not None]
    assert keys.tolist() == [request_key(one) for one in ids if one is not None]
    sliced, _ = request_keys(column.slice(100, 50))
    assert sliced.tolist() == [request_key(one) for one in ids[100:150] if one is not None]


def test_request_keys_of_nothing():
    for column in (
        pa.chunked_array([], pa.string()),
        pa.chunked_array([[None, None]], pa.string()),
    ):
        keys, places = request_keys(column)
        assert len(keys) == len(places) == 0


def test_request_ids_of_another_length_are_refused():
    with pytest.raises(pa.ArrowInvalid):
        request_keys(pa.chunked_array([["ab" * 16, "ab"]]))


@pytest.mark.parametrize(
    ("rows", "expected"), [([], 0), ([1, 2], 0), ([2, 0, 1], 3), ([0, 1, 3, 4], 2)]
)
def test_leading_rows_are_those_before_the_first_gap(rows, expected):
    keys = np.array([row_key(row, 0) for row in rows] + [row_key(7, 2)], np.uint64)
    assert num_leading_rows(keys) == expected
