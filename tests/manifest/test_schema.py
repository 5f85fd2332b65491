"""Column types, per-value rules and which columns pass through."""

import math
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from raydiff.errors import ManifestError, RowError
from raydiff.manifest.schema import (
    COLUMNS,
    LEDGER_COLUMNS,
    MAX_TEXT_CHARACTERS,
    check_schema,
    check_value,
    extra_columns,
    known_values,
)
from raydiff.output import metadata_schema


def refusal(schema: pa.Schema) -> str:
    with pytest.raises(ManifestError) as caught:
        check_schema(schema, "m.parquet")
    return str(caught.value)


def values(column: pa.Array, name: str = "seed") -> list[Any]:
    batch = pa.record_batch({"prompt": pa.array(["x"] * len(column)), name: column})
    return [row.get(name) for row in known_values(batch)]


def test_a_missing_prompt_column_names_the_nearest() -> None:
    message = refusal(pa.schema([("Prompt", pa.string()), ("id", pa.int64())]))
    assert message.startswith('manifest m.parquet has no column "prompt"; did you mean "Prompt"?')
    assert "found: Prompt, id." in message
    assert "found: no columns." in refusal(pa.schema([]))


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(
    "dtype", [pa.bool_(), pa.binary(), pa.list_(pa.string()), pa.timestamp("us"), pa.date32()]
)
def test_types_that_no_known_column_has(name: str, dtype: pa.DataType) -> None:
    schema = pa.schema({"prompt": pa.string()} | {name: dtype})
    message = refusal(schema)
    assert f'column "{name}" has the type {dtype}; it needs ' in message


def test_every_wrong_type_is_said_at_once() -> None:
    message = refusal(
        pa.schema(
            [
                ("prompt", pa.int64()),
                ("seed", pa.string()),
                ("height", pa.string()),
                ("guidance_scale", pa.large_string()),
                ("sampler", pa.float64()),
                ("note", pa.float64()),
            ]
        )
    )
    assert 'column "prompt" has the type int64; it needs text (string).' in message
    assert 'column "seed" has the type string; it needs whole numbers (int64).' in message
    assert 'column "height" has the type string; it needs whole numbers (int64).' in message
    assert "guidance_scale" in message
    assert "(float64)" in message
    assert "sampler" in message
    assert "note" not in message


def test_a_doubled_column_is_refused() -> None:
    schema = pa.schema([("prompt", pa.string()), ("seed", pa.int64()), ("seed", pa.int64())])
    assert 'column "seed" is there more than once' in refusal(schema)


@pytest.mark.parametrize(
    "dtype",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.null(),
    ],
)
def test_every_kind_of_text_is_text(dtype: pa.DataType) -> None:
    texts = [None, None] if pa.types.is_null(dtype) else ["euler", None]
    column = pa.array(texts, dtype)
    check_schema(pa.schema([("prompt", pa.string()), ("sampler", dtype)]), "m.parquet")
    assert values(column, "sampler") == texts


@pytest.mark.parametrize(
    "dtype",
    [
        pa.int8(),
        pa.uint16(),
        pa.int64(),
        pa.uint64(),
        pa.float32(),
        pa.float64(),
        pa.decimal128(10, 2),
        pa.dictionary(pa.int32(), pa.int64()),
        pa.null(),
    ],
)
def test_every_kind_of_number_is_a_number(dtype: pa.DataType) -> None:
    numbers = [None, None] if pa.types.is_null(dtype) else [30, None]
    column = pa.array([Decimal("30.00"), None] if pa.types.is_decimal(dtype) else numbers, dtype)
    check_schema(
        pa.schema([("prompt", pa.string()), ("seed", dtype), ("guidance_scale", dtype)]), "m"
    )
    found = values(column)
    assert found == numbers
    if found[0] is not None:
        assert type(check_value("seed", found[0])) is int
        assert type(check_value("guidance_scale", found[0])) is float


@pytest.mark.parametrize(
    "dtype",
    [
        pa.list_(pa.int64()),
        pa.large_list(pa.uint8()),
        pa.list_(pa.int32(), 2),
        pa.string(),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.int16(),
        pa.float32(),
        pa.list_(pa.null()),
        pa.null(),
    ],
)
def test_every_kind_of_list_is_a_list(dtype: pa.DataType) -> None:
    check_schema(pa.schema([("prompt", pa.string()), ("stg_blocks", dtype)]), "m.parquet")
    types = pa.types
    cells: list[Any] = [[29, 28], None, [7, 7]]
    expected: list[Any] = [(28, 29), None, (7,)]
    if types.is_null(dtype):
        cells, expected = [None] * 3, [None] * 3
    elif types.is_list(dtype) and types.is_null(dtype.value_type):
        cells, expected = [[], None, []], [(), None, ()]
    elif types.is_integer(dtype) or types.is_floating(dtype):
        cells, expected = [29, None, 0], [(29,), None, (0,)]
    elif not (types.is_nested(dtype)):
        cells, expected = [" 29, 28 ", None, "[]"], [(28, 29), None, ()]
    column = pa.array(cells, dtype)
    for part in (column, pa.concat_arrays([column, column]).slice(3), column.slice(1)):
        found = values(part, "stg_blocks")
        checked = [None if one is None else check_value("stg_blocks", one) for one in found]
        assert checked == expected[-len(part) :]


def test_a_list_may_be_given_in_python() -> None:
    assert check_value("stg_blocks", [3, 1]) == check_value("stg_blocks", (1, 3)) == (1, 3)
    assert check_value("stg_blocks", "[1, 3]") == (1, 3)
    assert check_value("stg_blocks", ()) == ()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (pa.array([[1, None]]), 'stg_blocks is "null"; it must be whole numbers such as 28,29.'),
        (pa.array([[1, -1]]), "stg_blocks is -1; it must be 0 to 1000."),
        (pa.array([[2**64 - 1]], pa.list_(pa.uint64())), "it must be whole numbers such as 28,29"),
        (pa.array([1.5]), "stg_blocks is 1.5; it must be a whole number."),
        (pa.array(["29;30"]), 'stg_blocks is "29;30"; it must be whole numbers'),
        (pa.array(["[29"]), 'stg_blocks is "[29"; it must be'),
        (pa.array(["29,,30"]), 'stg_blocks is "29,,30"; it must be'),
        (pa.array(["5" * 1_000_001]), "stg_blocks has 1,000,001 characters"),
    ],
)
def test_a_list_against_its_rule(cell: pa.Array, message: str) -> None:
    (found,) = values(cell, "stg_blocks")
    with pytest.raises(RowError) as caught:
        check_value("stg_blocks", found)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [pa.list_(pa.float64()), pa.list_(pa.list_(pa.int64()))])
def test_lists_of_other_things_are_refused(dtype: pa.DataType) -> None:
    message = refusal(pa.schema([("prompt", pa.string()), ("stg_blocks", dtype)]))
    assert "it needs lists of whole numbers (list<int64>)." in message


def test_text_that_is_not_utf8_costs_only_its_own_row() -> None:
    raw = pa.array([b"fine \xc3\xa9", b"\xff\xfe", None, b""], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    found = values(column, "negative_prompt")
    assert found == ["fine é", b"\xff\xfe", None, ""]
    with pytest.raises(RowError, match="negative_prompt is not valid UTF-8"):
        check_value("negative_prompt", found[1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_inference_steps", 0, "num_inference_steps is 0; it must be 1 to 1000."),
        ("num_inference_steps", 1001, "it must be 1 to 1000"),
        ("seed", -1, "seed is -1; it must be 0 to 9223372036854775807."),
        ("seed", 2**63, "it must be 0 to"),
        ("seed", 1.5, "seed is 1.5; it must be a whole number."),
        ("seed", math.nan, "seed is nan; it must be a whole number."),
        ("seed", math.inf, "it must be a whole number"),
        ("seed", 2.0**60, "exact only up to 2^53. Store the column as int64."),
        ("num_images", 0, "num_images is 0; it must be 1 to 4096."),
        ("num_images", 4097, "it must be 1 to 4096"),
        ("height", 8, "height is 8; it must be 16 to 16384."),
        ("width", -512, "width is -512; it must be"),
        ("guidance_scale", math.nan, "guidance_scale is nan; it must be 0 to 100."),
        ("guidance_scale", math.inf, "guidance_scale is inf; it must be 0 to 100."),
        ("guidance_scale", -0.5, "it must be 0 to 100"),
        ("guidance_rescale", 1.01, "it must be 0 to 1"),
        ("strength", -0.01, "strength is -0.01; it must be 0 to 1."),
        ("strength", 1.01, "strength is 1.01; it must be 0 to 1."),
        ("strength", math.nan, "strength is nan"),
        ("sampler", "eulr", 'sampler is "eulr"; did you mean "euler"? known: ddim, '),
        ("sampler", "", 'sampler is ""; known: ddim'),
        ("sampler", "\0\n" * 90, r'sampler is "\u0000\n'),
        ("task", "text2img", 'did you mean "txt2img"?'),
        ("prompt", "x" * (MAX_TEXT_CHARACTERS + 1), "prompt has 1,000,001 characters; 1,000,000"),
    ],
)
def test_a_value_against_its_rule(name: str, value: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        check_value(name, value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("seed", 2.0**53),
        ("guidance_scale", 0.0),
        ("guidance_scale", 100),
        ("strength", 1),
        ("num_inference_steps", 1000),
        ("prompt", ""),
        ("prompt", "a\0b\n../../etc/passwd"),
        ("prompt", "é" * 100_000),
        ("sampler", "dpmpp_2m_sde"),
    ],
)
def test_a_value_at_the_edge_of_its_rule(name: str, value: Any) -> None:
    assert check_value(name, value) == value


def test_minus_zero_is_zero() -> None:
    assert math.copysign(1, check_value("guidance_scale", -0.0)) == 1


def test_unknown_columns_pass_through_and_yield_to_the_metadata_s_own() -> None:
    names = ["prompt", "seed", "id", "status", "file_name", "manifest_status", "num_images"]
    schema = pa.schema([(name, pa.string()) for name in names])
    assert extra_columns(schema) == {
        "id": "id",
        "status": "manifest_manifest_status",
        "file_name": "manifest_file_name",
        "manifest_status": "manifest_status",
    }


def test_no_passed_through_name_is_one_of_the_metadata_s() -> None:
    own = set(metadata_schema.COLUMNS)
    assert own == LEDGER_COLUMNS
    renamed = extra_columns(pa.schema([(name, pa.int64()) for name in sorted(own)]))
    assert not own & set(renamed.values())
    assert set(renamed) == own - set(COLUMNS)
