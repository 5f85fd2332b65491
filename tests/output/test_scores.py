"""Scores on disk: types, errors, resuming, merging, what a crash leaves, the join."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydiff.errors import ConfigError, OutputError, RowError
from raydiff.output import scores
from raydiff.output.gallery.build import Gallery
from raydiff.output.keys import request_key
from raydiff.output.ledger import read_results
from raydiff.output.query import query_results
from raydiff.output.scores import FileScore, ScoreTable, columns_of, read_scores, score_names
from tests.output.generated_runs import write_run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of seven rows: one is bad, two are equal."""
    rows: list[dict[str, Any]] = [{"seed": seed} for seed in range(5)]
    return write_run(tmp_path / "out", [*rows, {"seed": 0, "bad": "wrong"}, {"seed": 4}])


def ids(out: Path) -> list[str]:
    return read_results(out)["request_id"].to_pylist()


def opened(out: Path, name: str = "style") -> ScoreTable:
    return ScoreTable(out, name, hook="hooks:style", arguments={})


def add(table: ScoreTable, request_id: str, **values: Any) -> None:
    table.add(FileScore(request_id=request_id, values=values))


def test_scores_are_joined_to_every_row_of_their_file(out: Path) -> None:
    known = ids(out)
    before = read_results(out)
    with opened(out) as table:
        for place in (3, 0, 4):
            add(table, known[place], style=f"s{place}")
        table.add(FileScore(request_id=known[1], error="broken file"))
        table.commit()
    with opened(out, "mean") as table:
        add(table, known[2], mean=np.float64(2.5).item())
        table.commit()
    joined = read_results(out, scores=True)
    assert joined.column_names == [
        *before.column_names,
        "mean",
        "mean_error",
        "style",
        "style_error",
    ]
    assert joined.select(before.column_names).equals(before)
    assert joined["style"].to_pylist() == ["s0", None, None, "s3", "s4", None, "s4"]
    assert joined["style_error"].to_pylist() == [None, "broken file", *[None] * 5]
    assert joined["mean"].to_pylist() == [None, None, 2.5, *[None] * 4]
    assert read_results(out).equals(before)
    some = read_results(out, ["seed"], scores=True)
    assert some.column_names == [
        "row_index", "image_index", "request_id", "seed", "mean", "mean_error", "style",
        "style_error",
    ]  # fmt: skip
    assert score_names(out) == ["mean", "style"]


def test_a_session_goes_on_where_the_last_one_committed(out: Path) -> None:
    known = ids(out)
    with opened(out) as table:
        assert len(table.done(with_errors=True)) == 0
        add(table, known[0], style=1)
        table.add(FileScore(request_id=known[1], error="no"))
        table.commit()
        add(table, known[2], style=2)  # never committed
    with opened(out) as table:
        done = {request_key(one) for one in known[:2]}
        assert set(table.done(with_errors=True).tolist()) == done
        assert table.done(with_errors=False).tolist() == [request_key(known[0])]
        add(table, known[1], style=0.5)  # scored again: the later row holds
        table.commit()
    found = read_scores(out, "style")
    assert dict(
        zip(*(found[name].to_pylist() for name in ("request_id", "style")), strict=True)
    ) == {
        known[0]: 1.0,
        known[1]: 0.5,
    }
    assert found["style_error"].null_count == 2
    assert found.schema.field("style").type == pa.float64()


def test_parts_are_merged_and_a_value_of_another_type_is_an_error(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "MAX_PARTS", 4)
    known = ids(out)
    with opened(out) as table:
        add(table, known[0], style_a=None)
        table.commit()
        for place, value in enumerate([7, 0.25, "text", True], start=1):
            add(table, known[place], style_a=value, style_b=[True, False][place % 2])
            table.commit()
        assert table.num_errors == 2
    assert len(list((out / "scores" / "style").glob("part-*"))) == 2
    rows = {row["request_id"]: row for row in read_scores(out, "style").to_pylist()}
    assert [rows[one]["style_a"] for one in known[:5]] == [None, 7.0, 0.25, None, None]
    assert [rows[one]["style_b"] for one in known[:3]] == [None, False, True]
    assert "returned string here, and double" in rows[known[3]]["style_error"]
    assert "returned bool here" in rows[known[4]]["style_error"]


def test_what_a_crash_left_is_put_right(out: Path) -> None:
    known = ids(out)
    with opened(out) as table:
        for place in (0, 1):
            add(table, known[place], style=place)
            table.commit()
    folder = out / "scores" / "style"
    first, second = sorted(folder.glob("part-*"))
    second.write_bytes(second.read_bytes()[:50])
    (folder / ".part-000009-000001.parquet.tmp").write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged"):
        assert read_scores(out, "style")["request_id"].to_pylist() == [known[0]]
    with opened(out) as table:
        assert len(table.warnings) == 1
        assert table.done(with_errors=True).tolist() == [request_key(known[0])]
    assert sorted(folder.glob("part-*")) == [first]
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))


def test_one_process_and_one_hook_for_a_name(out: Path) -> None:
    with opened(out) as table:
        with pytest.raises(OutputError, match="another driver is at work"):
            opened(out)
        add(table, ids(out)[0], style=1)
        table.commit()
    with pytest.raises(OutputError, match="of --with hooks:style, not of --with a:b --set x=1"):
        ScoreTable(out, "style", hook="a:b", arguments={"x": 1})
    opened(out).close()


def test_reading_scores_that_are_not_there(out: Path, tmp_path: Path) -> None:
    assert read_results(out, scores=True).equals(read_results(out))
    with pytest.raises(ConfigError, match="no score 'style'; it has none"):
        read_scores(out, "style")
    with pytest.raises(OutputError, match="not a run"):
        score_names(tmp_path)


@pytest.mark.parametrize(
    ("returned", "columns"),
    [
        (1.5, {"s": 1.5}),
        (np.float32(0.5), {"s": 0.5}),
        (np.array(3), {"s": 3}),
        (np.bool_(True), {"s": True}),
        (None, {"s": None}),
        ("lone \ud800", {"s": "lone \\ud800"}),
        ({"a": np.int8(-2), "b_c": "x"}, {"s_a": -2, "s_b_c": "x"}),
    ],
)
def test_what_a_hook_may_return(returned: Any, columns: dict[str, Any]) -> None:
    found = columns_of("s", returned)
    assert found == columns
    assert [type(value) for value in found.values()] == [type(one) for one in columns.values()]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1], "list"),
        (np.zeros(3), "ndarray"),
        (1j, "complex"),
        (b"x", "bytes"),
        (2**70, "64 bits"),
        ({}, "empty dict"),
        ({"a b": 1}, "'a b'"),
        ({3: 1}, "the key 3"),
        ({"error": 1}, "raydiff's own"),
        ({"a": {"b": 1}}, "a: the hook returned dict"),
    ],
)
def test_what_a_hook_may_not_return(returned: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        columns_of("s", returned)


def test_scores_are_columns_of_queries_and_of_the_gallery(out: Path) -> None:
    with opened(out, "bright") as table:
        for place, request_id in enumerate(ids(out)[:3]):
            add(table, request_id, bright=place / 2)
        table.commit()
    with query_results(out, "SELECT seed, bright FROM results ORDER BY row_index") as reader:
        rows = reader.read_all().to_pylist()
    assert [row["bright"] for row in rows] == [0.0, 0.5, 1.0, None, None, None, None]
    assert [row["seed"] for row in rows[:3]] == [0, 1, 2]
    Gallery(out).refresh()
    assert "bright" in (out / "gallery" / "data" / "status.js").read_text()
