"""Sweep axes: typed values, ranges that are never laid out, and every wrong one refused."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydiff.errors import ConfigError
from raydiff.manifest.axes import make_axis
from raydiff.manifest.schema import MAX_SEED

LISTS = pa.list_(pa.int64())


@pytest.mark.parametrize(
    ("name", "given", "values", "dtype"),
    [
        ("guidance_scale", "3, 5,7.5", [3.0, 5.0, 7.5], pa.float64()),
        ("guidance_scale", [3, None, 7.5], [3.0, None, 7.5], pa.float64()),
        ("guidance_scale", 5, [5.0], pa.float64()),
        ("sampler", "euler,null", ["euler", None], pa.string()),
        ("negative_prompt", '"a, ""b""",1984,null,"null",""', ['a, "b"', "1984", None, "null", ""],
         pa.string()),
        ("negative_prompt", "007,1.50", ["007", "1.50"], pa.string()),
        ("seed", "0-3,7,20-40:10", [0, 1, 2, 3, 7, 20, 30, 40], pa.int64()),
        ("seed", ["0-2", 9], [0, 1, 2, 9], pa.int64()),
        ("seed", str(MAX_SEED), [MAX_SEED], pa.int64()),
        ("num_inference_steps", "10-30:10", [10, 20, 30], pa.int64()),
        ("height", [512.0], [512], pa.int64()),
        ("size", "1,-2,3", [1, -2, 3], pa.int64()),
        ("size", "1,2.5,null", [1.0, 2.5, None], pa.float64()),
        ("size", "1,big", ["1", "big"], pa.string()),
        ("size", "007,1-3", ["007", "1-3"], pa.string()),
        ("size", f"{10**30}", [f"{10**30}"], pa.string()),
        ("size", '"1","2"', ["1", "2"], pa.string()),
        ("stg_blocks", '29,"28, 29","",null', [[29], [28, 29], [], None], LISTS),
        ("stg_blocks", [[29, 28], (), 7, "1,2"], [[28, 29], [], [7], [1, 2]], LISTS),
        ("stg_blocks", "0-2,40", [[0], [1], [2], [40]], LISTS),
        ("stg_blocks", "0-47", list(range(48)), pa.int64()),
        ("colour", [" red ", "dark, blue"], [" red ", "dark, blue"], pa.string()),
    ],
)  # fmt: skip
def test_values_are_typed(name: str, given: Any, values: list[Any], dtype: Any) -> None:
    axis = make_axis(name, given)
    found = axis.take(np.arange(axis.num_values))
    assert found.to_pylist() == values
    assert found.type == axis.type == dtype


def test_a_range_is_never_laid_out() -> None:
    axis = make_axis("seed", f"0-{MAX_SEED}")
    assert axis.num_values == 2**63
    assert axis.take(np.array([0, 5, 2**63 - 1], dtype=object)).to_pylist() == [0, 5, MAX_SEED]
    axis = make_axis("seed", "10-999999999:10")
    assert axis.num_values == 99_999_999
    assert axis.take(np.array([0, 99_999_998])).to_pylist() == [10, 999_999_990]
    assert axis.describe() == "10-999999999:10"


def test_lists_are_shown_as_the_command_line_writes_them() -> None:
    given = '29,"28,29","",null'
    axis = make_axis("stg_blocks", given)
    assert axis.describe() == '29, "28,29", "", null'
    assert make_axis("stg_blocks", axis.describe()).identity() == axis.identity()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("guidance_scale", "", "axis guidance_scale has no values"),
        ("guidance_scale", [], "axis guidance_scale has no values"),
        ("guidance_scale", " ", "has no values"),
        ("guidance_scale", "3,,5", "has an empty value"),
        ("guidance_scale", "3,", "has an empty value"),
        ("guidance_scale", "3,high", '"high" is not a number'),
        ("guidance_scale", "nan", '"nan" is not a number'),
        ("guidance_scale", "500", "it must be 0 to 100"),
        ("guidance_scale", "3,3.0", '"3" is there twice'),
        ("guidance_scale", [True], "true and false"),
        ("seed", "0-3,2", '"2" is there twice'),
        ("seed", "9-0", "9-0 is no range"),
        ("seed", "0-9:0", "is no range"),
        ("seed", f"0-{2**63}", "it must be 0 to"),
        ("seed", str(2**63), "it must be 0 to"),
        ("seed", "-1", "it must be 0 to"),
        ("seed", "1.5", "it must be a whole number"),
        ("seed", "0-999999999,5", "1,000,000,001 values in several parts"),
        ("num_inference_steps", "1-2000", "it must be 1 to 1000"),
        ("sampler", "eulr", 'did you mean "euler"?'),
        ("stg_blocks", "middle", 'stg_blocks is "middle"; it must be whole numbers'),
        ("stg_blocks", "1001", "it must be 0 to 1000"),
        ("stg_blocks", [[1, 2], "2,1"], '"1,2" is there twice'),
        ("guidance_scale", [[1, 2]], "its values are not lists"),
        ("colour", [(1, 2), "red"], "its values are not lists"),
        ("colour", 'a "b"', "odd double quote"),
        ("colour", '"a', "odd double quote"),
        ("colour", "red,red", '"red" is there twice'),
        ("colour", ["\ud800"], "not valid Unicode"),
    ],
)
def test_wrong_values_are_refused(name: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_axis(name, given)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"axis {name}")
