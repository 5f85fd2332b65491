"""SQL over the metadata: every row once, whatever a driver does meanwhile, and nothing but it."""

import csv
import io
import json
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.config import OutputConfig
from raydiff.errors import ConfigError, OutputError
from raydiff.output.ledger import FINAL_ROWS, Ledger, read_results
from raydiff.output.query import open_results, query_results
from raydiff.output.rows_file import print_rows, write_rows
from tests.output.generated_runs import write_run

COLUMNS = pa.schema([("style", pa.string()), ("tags", pa.list_(pa.int64()))])
ROWS = [
    {"seed": seed, "prompt": f'<b>"{seed}"</b>, مرحبا', "style": style, "tags": [seed, -seed]}
    for seed in range(4)
    for style in ("photo", "drawing")
]
ROWS.append({"bad": "row 8: no prompt", "style": "photo"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "out", ROWS, columns=COLUMNS, commit_every=3)


def rows_of(out: Path, sql: str) -> list[dict]:
    with query_results(out, sql) as reader:
        return reader.read_all().to_pylist()


def test_all_of_the_metadata_is_there(run: Path) -> None:
    assert rows_of(run, "FROM results ORDER BY row_index") == read_results(run).to_pylist()
    assert rows_of(run, "SELECT style, count(*) n FROM results GROUP BY style ORDER BY n") == [
        {"style": "drawing", "n": 4},
        {"style": "photo", "n": 5},
    ]
    assert rows_of(run, "SELECT tags[2] t FROM results WHERE seed = 3") == [{"t": -3}] * 2


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM glob('{folder}/*')",
        "COPY results TO '{folder}/copy.csv'",
        "EXPORT DATABASE '{folder}/export'",
        "ATTACH '{folder}/new.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
        "SET enable_external_access = true",
        "SET temp_directory = '{folder}'",
        "SELECT * FROM connection",
        "SELECT * FROM sql",
    ],
)
def test_a_query_reaches_nothing_else(run: Path, tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("word\nxyzzy\n")
    with pytest.raises(ConfigError) as caught:
        rows_of(run, sql.format(file=secret, folder=tmp_path))
    assert "\n" not in str(caught.value)
    assert "xyzzy" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT promt FROM results", '"prompt"'),
        ("SELECT * FROM result", "results"),
        ("SELEC 1", "syntax error"),
        ("SELECT prompt::INTEGER FROM results", "Could not convert"),
        ("", "gives no rows"),
        ("SELECT 'x", "unterminated"),
    ],
)
def test_what_is_wrong_is_one_line(run: Path, sql: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows_of(run, sql)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a run"):
        rows_of(tmp_path, "FROM results")


def test_without_duckdb_it_says_how_to_install_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ConfigError, match=r'pip install "raydiff\[query\]"'):
        rows_of(run, "FROM results")


def test_rows_stay_while_a_driver_merges_their_parts(begin, make) -> None:
    """Sixteen parts of one row become one, between opening the table and reading it."""
    run = begin()
    config = OutputConfig()
    ledger = Ledger(run.out_dir, extra_schema=make.no_columns, config=config, lock=run.lock)

    def add(row: int) -> None:
        request = make.request(row)
        ledger.add(make.row(request, row), make.result(request))
        ledger.commit()

    for row in range(15):
        add(row)
    results = open_results(run.out_dir)
    before = set((run.out_dir / "metadata").glob("part-*.parquet"))
    add(15)
    assert len(before) == 15
    assert not any(path.exists() for path in before)
    assert sorted(results.to_table()["row_index"].to_pylist()) == list(range(15))
    assert rows_of(run.out_dir, "SELECT count(*) n FROM results") == [{"n": 16}]


def test_a_row_that_stands_twice_is_one(run: Path, tmp_path: Path) -> None:
    table = pq.read_table(next((run / "metadata").glob("part-*-000001.parquet")))
    (tmp_path / "metadata").mkdir()
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    changed = table.set_column(table.schema.get_field_index("prompt"), "prompt", [["second"] * 3])
    pq.write_table(table, tmp_path / "metadata" / "part-000001-000001.parquet")
    pq.write_table(changed.slice(1), tmp_path / "metadata" / "part-000002-000001.parquet")
    expected = read_results(tmp_path).to_pylist()
    assert len(expected) == 3
    assert rows_of(tmp_path, "FROM results ORDER BY row_index") == expected


def test_a_damaged_part_is_left_out_with_a_warning(run: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    parts = sorted((run / "metadata").glob("part-*.parquet"))
    for path in parts:
        (tmp_path / "metadata" / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "metadata" / parts[0].name
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=f"{parts[0].name}: damaged"):
        assert rows_of(tmp_path, "SELECT count(*) n FROM results") == [{"n": len(ROWS) - 3}]


def test_memory_is_flat(run: Path, tmp_path: Path) -> None:
    """A million prompts (200 MB) are read by row groups, a few ahead of the query."""
    psutil = pytest.importorskip("psutil")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    names = ("row_index", "image_index", "prompt")
    schema = pa.schema([read_results(run).schema.field(name) for name in names])
    for part in range(16):
        path = tmp_path / "metadata" / f"part-000001-{part + 1:06d}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(part * FINAL_ROWS, (part + 1) * FINAL_ROWS, 4096):
                values = [list(range(start, start + 4096)), [0] * 4096, ["x" * 200] * 4096]
                writer.write_table(pa.table(values, schema=schema))
    process = psutil.Process()
    before = process.memory_info().rss
    most = num_rows = 0
    with query_results(tmp_path, "SELECT row_index, length(prompt) AS n FROM results") as reader:
        for batch in reader:
            num_rows += batch.num_rows
            most = max(most, process.memory_info().rss - before)
    assert num_rows == 16 * FINAL_ROWS
    assert most < 180e6


def test_rows_as_csv_json_and_parquet(run: Path, tmp_path: Path) -> None:
    sql = (
        "SELECT seed, prompt, tags, prompt LIKE '%2%' AS has_two, 'NaN'::DOUBLE AS nan, "
        "sum(seed) OVER () AS total, TIMESTAMPTZ '2026-01-02 03:04:05+00' AS at, "
        "1 AS one, 2 AS one, NULL AS nothing FROM results WHERE seed >= 2 ORDER BY row_index"
    )
    texts = {}
    for format_ in ("csv", "json"):
        texts[format_] = io.StringIO()
        with query_results(run, sql) as reader:
            assert print_rows(texts[format_], format_, reader) == 4
    parsed = json.loads(texts["json"].getvalue())
    expected = {
        "seed": 2,
        "prompt": '<b>"2"</b>, مرحبا',
        "tags": [2, -2],
        "has_two": True,
        "nan": None,
        "total": 10,
        "at": "2026-01-02T03:04:05+00:00",
        "one": 1,
        "one_2": 2,
        "nothing": None,
    }
    assert parsed[0] == expected
    records = list(csv.DictReader(io.StringIO(texts["csv"].getvalue())))
    assert [int(record["seed"]) for record in records] == [2, 2, 3, 3]
    assert records[0]["prompt"] == expected["prompt"]
    assert json.loads(records[0]["tags"]) == [2, -2]
    assert records[0]["nothing"] == ""
    with query_results(run, sql) as reader:
        assert write_rows(tmp_path / "rows.parquet", "parquet", reader) == 4
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["total"].to_pylist() == [Decimal(10)] * 4
    assert table["at"][0].as_py() == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert table.column_names[-3:] == ["one", "one_2", "nothing"]


def test_no_rows_are_valid_files(run: Path, tmp_path: Path) -> None:
    for format_ in ("csv", "json", "parquet"):
        with query_results(run, "SELECT seed, prompt FROM results WHERE seed > 99") as reader:
            assert write_rows(tmp_path / f"rows.{format_}", format_, reader) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == []
    assert (tmp_path / "rows.csv").read_text() == "seed,prompt\n"
    assert pq.read_table(tmp_path / "rows.parquet").column_names == ["seed", "prompt"]


def test_a_failed_query_leaves_the_file_as_it_was(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("before")
    with (
        pytest.raises(ConfigError),
        query_results(run, "SELECT prompt::INTEGER FROM results") as reader,
    ):
        write_rows(path, "csv", reader)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with (
        query_results(run, "SELECT 1") as reader,
        pytest.raises(OutputError, match="could not be written"),
    ):
        write_rows(tmp_path / "gone" / "rows.csv", "csv", reader)
    with (
        query_results(run, "SELECT 1") as reader,
        pytest.raises(OutputError, match="not a file"),
    ):
        write_rows(Path("/dev/null"), "csv", reader)
