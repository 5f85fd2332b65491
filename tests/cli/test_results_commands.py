"""`sheet`, `query` and `diff` as a user calls them, on the runs of a tiny model."""

import csv
import io
import json
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raydiff
from raydiff.cli.table import print_table
from raydiff.config import RunConfig
from raydiff.output.progress import ProgressFile
from raydiff.output.run_file import start_run
from tests.cli.command import cli
from tests.output.generated_runs import write_run

PROMPTS = [
    "a red fox",
    "<script>alert(\"x\")</script>, 'quotes'",
    "مرحبا \u202eb",
    "long " + "x" * 10_000,
]


@pytest.fixture(scope="module")
def runs(tiny_sd21: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `out`, one render of a sweep in which one row is bad."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "style": f"s{seed % 2}"}
        for prompt in PROMPTS
        for seed in (1, 2)
        for steps in (2, 3)
    ]
    rows.append({"prompt": "bad", "seed": 1, "num_inference_steps": 0, "style": "s1"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "sweep.parquet")
    cli("render", "sweep.parquet", "--model", tiny_sd21, "--out", "out", cwd=folder, status=1)
    return folder


def test_sheet(runs: Path) -> None:
    run = cli("sheet", "out", "--x", "seed", "--y", "prompt", "--cell", "64", cwd=runs)
    assert run.stdout == "sheet.png: 1 page, 2 x 4 cells\n"
    assert "cells with several results: 8 (up to 2)" in run.stderr
    assert "They differ in num_inference_steps" in run.stderr
    assert "bad rows without values on the axes, left out: 1" in run.stderr
    with Image.open(runs / "sheet.png") as image:
        assert image.getpixel((2, 2)) == (255, 255, 255)
        assert len(set(image.resize((80, 80)).get_flattened_data())) > 100
    options = ("--x", "style", "--y", "seed", "--z", "num_inference_steps", "--out", "sheet.pdf")
    assert "2 pages" in cli("sheet", "out", *options, cwd=runs).stdout
    assert (runs / "sheet.pdf").read_bytes().startswith(b"%PDF")
    plain = cli("sheet", "out", "--out", "all.png", "--limit", "5", "--cell", "64", cwd=runs)
    assert plain.stdout == "all.png: 1 page, 5 results\n"
    everything = cli("sheet", "out", "--out", "all.png", "--cell", "64", cwd=runs)
    assert "cells without a picture, failed: 1" in everything.stderr


def test_query(runs: Path) -> None:
    sql = "SELECT prompt, seed, style FROM results WHERE status = 'completed' ORDER BY row_index"
    records = list(csv.DictReader(io.StringIO(cli("query", "out", sql, cwd=runs).stdout)))
    assert [record["prompt"] for record in records] == [one for one in PROMPTS for _ in range(4)]
    rows = json.loads(cli("query", "out", sql, "--format", "json", cwd=runs).stdout)
    assert [row["style"] for row in rows] == ["s1", "s1", "s0", "s0"] * 4
    run = cli("query", "out", "FROM results", "--to", "all.parquet", cwd=runs)
    assert "17 rows written to all.parquet" in run.stderr
    expected = raydiff.read_results(runs / "out")
    written = pq.read_table(runs / "all.parquet").sort_by("row_index")
    assert written.to_pylist() == expected.to_pylist()
    table = cli("query", "out", sql, "--format", "table", "--limit", "3", cwd=runs)
    assert table.stdout.splitlines()[0].split() == ["prompt", "seed", "style"]
    assert len(table.stdout.splitlines()) == 4
    assert "The first 3 rows" in table.stderr


def test_diff(runs: Path) -> None:
    assert "16 in both: 16 equal" in cli("diff", "out", "out", cwd=runs).stdout
    run = cli("diff", "out", "out", "--json", cwd=runs)
    summary = json.loads(run.stdout)
    assert summary["counts"] == {"equal": 16}
    assert summary["left_out"] == {"left": 1, "right": 1}
    shutil.copytree(runs / "out", runs / "copy")
    files = raydiff.read_results(runs / "out")["file_name"].to_pylist()
    (runs / "copy" / files[0]).unlink()
    (runs / "copy" / files[1]).write_bytes(b"x")
    run = cli("diff", "out", "copy", "--to", "worst.csv", cwd=runs, status=1)
    assert "16 in both: 1 missing file, 1 broken file, 14 equal" in run.stdout
    assert f"missing file: row 0: right {files[0]}: the file is missing" in run.stdout
    assert f"broken file: row 1: right {files[1]}" in run.stdout
    records = list(csv.DictReader((runs / "worst.csv").read_text().splitlines()))
    assert [record["outcome"] for record in records] == ["missing_file", "broken_file"]


def test_diff_of_two_settings(runs: Path, tiny_sd21: Path) -> None:
    """The 2-step half of the sweep beside the 3-step half, as two runs."""
    results = raydiff.read_results(runs / "out").to_pylist()
    for steps in (2, 3):
        shutil.copytree(runs / "out", runs / f"steps{steps}")
        for part in (runs / f"steps{steps}" / "metadata").glob("part-*.parquet"):
            table = pq.read_table(part)
            pq.write_table(table.filter(pa.compute.field("num_inference_steps") == steps), part)
    run = cli("diff", "steps2", "steps3", cwd=runs, status=1)
    assert "0 in both" in run.stdout
    assert "--on prompt,seed" in run.stdout
    options = ("--on", "prompt,seed", "--json", "--top", "3", "--to", "diff.parquet")
    summary = json.loads(cli("diff", "steps2", "steps3", *options, cwd=runs, status=1).stdout)
    assert summary["counts"] == {"different": 8}
    assert len(summary["worst"]) == 3
    table = pq.read_table(runs / "diff.parquet")
    assert table["psnr"].to_pylist() == sorted(table["psnr"].to_pylist())
    assert table["prompt"][0].as_py() == summary["worst"][0]["key"]["prompt"]
    assert summary["psnr"]["lowest"] == table["psnr"][0].as_py()
    assert 0 < summary["ssim"]["lowest"] < 1
    assert set(table["left_file"].to_pylist()) == {
        row["file_name"] for row in results if row["num_inference_steps"] == 2
    }
    text = cli("diff", "steps2", "steps3", "--on", "prompt,seed", cwd=runs, status=1).stdout
    assert "\u202e" not in text
    assert "PSNR of those that differ" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sheet", "."], "not a run"),
        (["sheet", "out", "--x", "guidance"], 'did you mean "guidance_scale"'),
        (["sheet", "out", "--x", "strength"], "is empty"),
        (["sheet", "out", "--out", "sheet.gif"], ".png or a .pdf"),
        (["query", ".", "FROM results"], "not a run"),
        (["query", "out", "SELECT promt FROM results"], '"prompt"'),
        (["query", "out", "SELECT 1", "--to", "rows.xlsx"], ".csv, .json, .parquet"),
        (["query", "out", "SELECT 1", "--format", "parquet"], "--to"),
        (["query", "out", "SELECT 1", "--format", "table", "--to", "x.csv"], "terminal"),
        (["query", "out", "COPY results TO 'x.csv'"], "disabled"),
        (["diff", "out", "gone"], "no such folder"),
        (["diff", "out", "out", "--on", "promt"], 'did you mean "prompt"'),
        (["diff", "out", "out", "--on", "style"], "Add a column"),
        (["diff", "out", "out", "--on", ","], "at least one column"),
        (["diff", "out", "out", "--to", "gone/d.csv"], "could not be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_clear_message(
    runs: Path, arguments: list[str], message: str
) -> None:
    run = cli(*arguments, cwd=runs, status=2)
    assert message in run.stderr
    assert not (runs / "x.csv").exists()


def test_a_run_that_is_still_being_written_is_read_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "out", [{"seed": seed} for seed in range(3)])
    same = {"manifest_uri": "prompts.parquet", "manifest_fingerprint": "ab" * 16, "num_rows": 3}
    with start_run(tmp_path / "out", config=RunConfig(), models={"sdxl": "0f1e2d"}, **same) as run:
        now = time.time()
        counts = {"total": 9, "done": 3, "failed": 0, "quarantined": 0, "duplicates": 0}
        progress = ProgressFile(run.out_dir, epoch=run.lock.epoch, started_at=now)
        progress.update(state="running", **counts, workers=(), now=now)
        for arguments in (
            ["sheet", "out", "--cell", "32"],
            ["query", "out", "SELECT count(*) FROM results"],
            ["diff", "out", "out"],
        ):
            assert "out is still being rendered" in cli(*arguments, cwd=tmp_path).stderr


def test_a_table_fits_the_terminal_and_obeys_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [[1, "\x1b[31mred\x07\u202e", 0.5], [1000, "山の写真" * 30, None]]
    print_table(["n", "text", "score"], rows)
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["n", "text", "score"]
    assert first.split() == ["1", r"\x1b[31mred\x07\u202e", "0.5"]
    assert second.startswith("1000  山の写真")
    assert "…" in second
    assert len(second) < 60
    print_table([f"column{number}" for number in range(30)], [list(range(30))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "row 1"
    assert lines[-1].split() == ["column29", "29"]
