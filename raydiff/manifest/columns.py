"""The known columns of many rows at once: texts by their hash, seeds as integers, and the
settings that rows share, each checked by the rules of `check_value`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raydiff.manifest.schema import (
    MAX_EXACT_FLOAT,
    MAX_SEED,
    MAX_TEXT_CHARACTERS,
    plain_array,
    python_values,
)

Keys = NDArray[np.uint64]
Flags = NDArray[np.bool_]


class Texts(NamedTuple):
    """A column of text. `is_bad` are values that break a rule, null is not one of them."""

    values: NDArray[np.object_]
    """str, None where it is null or not valid UTF-8."""
    hashes: Keys
    """Of this process; unspecified where there is no value."""
    is_given: Flags
    is_bad: Flags


class Seeds(NamedTuple):
    """A column of seeds; `values` are 0 where none is given or it is bad."""

    values: NDArray[np.int64]
    is_given: Flags
    is_bad: Flags


def read_texts(batch: pa.RecordBatch, name: str) -> Texts:
    """Read a column of text; one that is not there is all null."""
    num_rows = batch.num_rows
    is_given = given(batch, name)
    if not is_given.any():
        nothing = np.full(num_rows, None, np.object_)
        return Texts(nothing, np.zeros(num_rows, np.uint64), is_given, ~is_given & False)
    array = plain_array(batch.column(name))
    is_bad = np.zeros(num_rows, np.bool_)
    try:
        array.validate(full=True)
        values = array.to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        values = np.empty(num_rows, np.object_)
        values[:] = python_values(array)
        is_bad = np.array([isinstance(value, bytes) for value in values])
        values[is_bad] = None
    lengths = pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero((lengths > MAX_TEXT_CHARACTERS) & ~is_bad):
        is_bad[row] = len(values[row]) > MAX_TEXT_CHARACTERS
    hashes = np.fromiter(map(hash, values), np.int64, num_rows).view(np.uint64)
    return Texts(values, hashes, is_given, is_bad)


def read_seeds(batch: pa.RecordBatch) -> Seeds:
    """Read the column `seed`, which may hold integers or whole floats."""
    is_given = given(batch, "seed")
    if not is_given.any():
        return Seeds(np.zeros(batch.num_rows, np.int64), is_given, ~is_given & False)
    filled = pc.fill_null(plain_array(batch.column("seed")), 0).to_numpy(zero_copy_only=False)
    if np.issubdtype(filled.dtype, np.floating):
        with np.errstate(invalid="ignore"):
            is_whole = (np.floor(filled) == filled) & (np.abs(filled) <= MAX_EXACT_FLOAT)
            is_bad = ~(is_whole & (filled >= 0))
    else:
        is_bad = (filled < 0) | (filled > MAX_SEED)
    return Seeds(np.where(is_bad, 0, filled).astype(np.int64), is_given, is_bad)


def given(batch: pa.RecordBatch, name: str) -> Flags:
    """Return where a column has a value."""
    if name not in batch.schema.names:
        return np.zeros(batch.num_rows, np.bool_)
    is_given: Flags = batch.column(name).is_valid().to_numpy(zero_copy_only=False)
    return is_given


def group_rows(
    batch: pa.RecordBatch, names: Sequence[str]
) -> tuple[list[tuple[Any, ...]], NDArray[np.int64]]:
    """Return the different rows of some columns as Python values, and which of them each row is."""
    groups: list[tuple[Any, ...]] = [()]
    codes = np.zeros(batch.num_rows, np.int64)
    for name in names:
        encoded = plain_array(batch.column(name)).dictionary_encode()
        values = [*python_values(encoded.dictionary), None]
        column_codes = _as_int64(pc.fill_null(encoded.indices, len(values) - 1))
        pairs = pa.array(codes * len(values) + column_codes).dictionary_encode()
        codes = _as_int64(pairs.indices)
        groups = [
            (*groups[pair // len(values)], values[pair % len(values)])
            for pair in pairs.dictionary.to_pylist()
        ]
    return groups, codes


def _as_int64(array: pa.Array) -> NDArray[np.int64]:
    values: NDArray[np.int64] = array.to_numpy().astype(np.int64)
    return values


def mixed(keys: Keys, values: Keys) -> Keys:
    """Mix further values into keys (the finaliser of SplitMix64, which is one to one)."""
    state: Keys = (keys ^ values) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)
