"""The manifest's known columns: the Arrow types that each may have and the rules of its values.
Everything else in a manifest is an extra column, passed through to the metadata."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from raydiff.errors import ManifestError, RowError, nearest
from raydiff.request import SAMPLERS, TASKS, ManifestRow, RenderRequest, RenderResult
from raydiff.video_settings import VideoSettings

MAX_TEXT_CHARACTERS = 1_000_000
MAX_SEED = 2**63 - 1
MAX_EXACT_FLOAT = 2**53
"""Largest whole number up to which a float column holds every whole number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """What a known column holds: text, maybe one of `choices`, a number from `low` to `high`, or a
    list of such numbers."""

    kind: Literal["text", "whole number", "number", "whole numbers"]
    choices: tuple[str, ...] = ()
    low: int = 0
    high: int = 0


COLUMNS: dict[str, Column] = {
    "prompt": Column(kind="text"),
    "negative_prompt": Column(kind="text"),
    "model": Column(kind="text"),
    "task": Column(kind="text", choices=TASKS),
    "seed": Column(kind="whole number", low=0, high=MAX_SEED),
    "num_images": Column(kind="whole number", low=1, high=4096),
    "height": Column(kind="whole number", low=16, high=16384),
    "width": Column(kind="whole number", low=16, high=16384),
    "num_frames": Column(kind="whole number", low=1, high=100_000),
    "frame_rate": Column(kind="number", low=0, high=1000),
    "num_inference_steps": Column(kind="whole number", low=1, high=1000),
    "guidance_scale": Column(kind="number", low=0, high=100),
    "guidance_rescale": Column(kind="number", low=0, high=1),
    "stg_scale": Column(kind="number", low=0, high=100),
    "stg_blocks": Column(kind="whole numbers", low=0, high=1000),
    "modality_scale": Column(kind="number", low=0, high=100),
    "audio_guidance_scale": Column(kind="number", low=0, high=100),
    "audio_stg_scale": Column(kind="number", low=0, high=100),
    "audio_modality_scale": Column(kind="number", low=0, high=100),
    "audio_guidance_rescale": Column(kind="number", low=0, high=1),
    "sampler": Column(kind="text", choices=SAMPLERS),
    "strength": Column(kind="number", low=0, high=1),
    "init_image": Column(kind="text"),
}

LEDGER_COLUMNS: frozenset[str] = frozenset(
    {
        field.name
        for noun in (ManifestRow, RenderRequest, VideoSettings, RenderResult)
        for field in fields(noun)
    }
    - {"request", "video", "extra"}
    | {"raydiff_version"}
)
"""Columns that the metadata writes itself; an extra column of such a name gets a prefix."""


def check_schema(schema: pa.Schema, uri: str) -> None:
    """Raise ManifestError if `prompt` is missing, or a known column is doubled or mistyped."""
    names: list[str] = schema.names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ManifestError(
            f"manifest {uri}: column {quoted(doubled[0])} is there more than once. Rename one."
        )
    if "prompt" not in names:
        raise ManifestError(
            f'manifest {uri} has no column "prompt"; {nearest("prompt", names)}'
            f"found: {', '.join(names) or 'no columns'}. Rename the one that holds the prompts."
        )
    problems = [
        f'column "{name}" has the type {schema.field(name).type}; it needs {_wanted(column)}.'
        for name, column in COLUMNS.items()
        if name in names and not _is_accepted(schema.field(name).type, column)
    ]
    if problems:
        raise ManifestError(f"manifest {uri}: {' '.join(problems)} Cast it and save again.")


def extra_columns(schema: pa.Schema) -> dict[str, str]:
    """Return {column: its name in the metadata} of the columns that are passed through."""
    names: list[str] = schema.names
    taken = LEDGER_COLUMNS | set(names)
    renamed = {}
    for name in names:
        if name in COLUMNS:
            continue
        new = name
        if name in LEDGER_COLUMNS:
            while new in taken:
                new = f"manifest_{new}"
        renamed[name] = new
    return renamed


def known_values(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield for each row its known columns that are not null, in the order of COLUMNS.

    Text that is not valid UTF-8 comes as bytes, for `check_value` to refuse.
    """
    names = [name for name in COLUMNS if name in batch.schema.names]
    columns = [python_values(batch.column(name)) for name in names]
    for cells in zip(*columns, strict=True):
        yield {name: value for name, value in zip(names, cells, strict=True) if value is not None}


def check_value(name: str, value: Any) -> Any:
    """Return the value of a known column as str, int, float or, ascending and each once, a tuple of
    int; or raise RowError with the rule."""
    column = COLUMNS[name]
    if column.kind == "text":
        return _check_text(name, value, column.choices)
    if column.kind == "whole numbers":
        return tuple(sorted({_check_number(name, one, column) for one in _listed(name, value)}))
    return _check_number(name, value, column)


def _check_number(name: str, value: Any, column: Column) -> Any:
    if column.kind == "number":
        value = float(value) + 0.0  # + 0.0 makes -0.0 the same request as 0.0
    elif isinstance(value, float):
        value = _whole(name, value)
    if not column.low <= value <= column.high:  # false for NaN too
        raise RowError(f"{name} is {value}; it must be {column.low} to {column.high}.")
    return value


def _listed(name: str, value: Any) -> list[Any]:
    """Return the numbers of a list, which may be text (`28,29` or `[28, 29]`) or one number."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str | bytes):
        return [value]
    text = _check_text(name, value, ())
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1].strip()
    numbers = [number.strip() for number in inner.split(",")] if inner else []
    if not all(_WHOLE_NUMBER.fullmatch(number) for number in numbers):
        raise RowError(f"{name} is {quoted(text)}; it must be whole numbers such as 28,29.")
    return [int(number) for number in numbers]


_WHOLE_NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)


def _check_text(name: str, value: str | bytes, choices: tuple[str, ...]) -> str:
    if isinstance(value, bytes):
        raise RowError(f"{name} is not valid UTF-8. Save the manifest with UTF-8 text.")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise RowError(
            f"{name} has {len(value):,} characters; {MAX_TEXT_CHARACTERS:,} are allowed. Cut it."
        )
    if choices and value not in choices:
        hint = nearest(value[:100], choices)
        raise RowError(f"{name} is {quoted(value)}; {hint}known: {', '.join(choices)}.")
    return value


def _whole(name: str, value: float) -> int:
    """A column of whole numbers with gaps is often stored as float (pandas): read it so."""
    if not value.is_integer():
        raise RowError(f"{name} is {value}; it must be a whole number.")
    if abs(value) > MAX_EXACT_FLOAT:
        raise RowError(
            f"{name} is {value} in a float column, which is exact only up to 2^53. "
            "Store the column as int64."
        )
    return int(value)


def plain_array(array: pa.Array) -> pa.Array:
    """Return an array without a dictionary, its fractions as float64, its lists as text: 28,29."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    if _is_list(array.type):
        texts = pc.binary_join(array.cast(pa.large_list(pa.string())), ",")
        # A list that has a null in it comes out null: "null" is for `check_value` to refuse.
        array = pc.if_else(array.is_valid(), pc.fill_null(texts, "null"), None)
    return array


def python_values(array: pa.Array) -> list[Any]:
    """Return the values of a known column, lists as text.

    Text that is not valid UTF-8 comes as bytes.
    """
    array = plain_array(array)
    try:
        values: list[Any] = array.to_pylist()
    except UnicodeDecodeError:
        values = [_decoded(raw) for raw in array.cast(pa.large_binary()).to_pylist()]
    return values


def _decoded(raw: bytes | None) -> str | bytes | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return raw


def _is_accepted(dtype: pa.DataType, column: Column) -> bool:
    types = pa.types
    if types.is_null(dtype):
        return True
    if types.is_dictionary(dtype):
        dtype = dtype.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    numbers = (types.is_integer, types.is_floating, types.is_decimal)
    tests = {
        "text": texts,
        "whole number": numbers,
        "number": numbers,
        "whole numbers": (*texts, *numbers, _is_list_of_integers),
    }
    return any(test(dtype) for test in tests[column.kind])


def _is_list_of_integers(dtype: pa.DataType) -> bool:
    types = pa.types
    return _is_list(dtype) and any(
        test(dtype.value_type) for test in (types.is_integer, types.is_null)
    )


def _is_list(dtype: pa.DataType) -> bool:
    types = pa.types
    return any(
        test(dtype) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list)
    )


def _wanted(column: Column) -> str:
    return {
        "text": "text (string)",
        "whole number": "whole numbers (int64)",
        "number": "numbers (float64)",
        "whole numbers": "lists of whole numbers (list<int64>)",
    }[column.kind]


def quoted(text: str) -> str:
    """Quote a value for a message: escaped, and cut at 80 characters."""
    return json.dumps(text if len(text) <= 80 else f"{text[:80]}...", ensure_ascii=False)
