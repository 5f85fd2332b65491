"""`raydiff score` on a run of a tiny model: hooks that work, raise, crash and are not there."""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raydiff
from raydiff.engine.score_worker import ScoreSpec, ScoreWorker
from raydiff.errors import ConfigError
from tests.cli.command import cli

HOOKS = """
import os
from pathlib import Path


def faulty(pixels, row):
    if row["row_index"] == 1:
        raise KeyError("no such face")
    if row["row_index"] == 2:
        return [1, 2]
    return {"label": "noise", "mean": pixels.mean(), "index": row["row_index"], "is_odd": True}


def deadly(pixels, row):
    if row["row_index"] == 3:
        os.abort()
    return row["row_index"]


class Model:
    def __init__(self, folder, scale=1):
        self.scale = scale
        Path(folder, str(os.getpid())).touch()

    def __call__(self, pixels, row):
        return float(pixels.mean()) * self.scale


class Broken:
    def __init__(self):
        raise OSError("no checkpoint here")

    def __call__(self, pixels, row):
        return 1


def three(pixels, row, threshold):
    return 1
"""


@pytest.fixture(scope="module")
def folder(tiny_sd21: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hooks.py and the run `out`: eight rows, of which two are equal and one bad."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "hooks.py").write_text(HOOKS)
    rows = {
        "prompt": ["a fox"] * 8,
        "seed": [0, 1, 2, 3, 4, 5, 5, 6],
        "height": [64] * 7 + [65],
    }
    pq.write_table(pa.table(rows), folder / "m.parquet")
    cli(
        "render", "m.parquet", "--model", tiny_sd21, "--out", "out",
        "--set", "defaults.num_inference_steps=1", cwd=folder, status=1,
    )  # fmt: skip
    return folder


def test_two_workers_score_every_file_once_and_errors_stay_alone(folder: Path) -> None:
    missing = raydiff.read_results(folder / "out")["file_name"][4].as_py()
    (folder / "out" / missing).rename(folder / "hidden.png")
    arguments = ("score", "out", "--with", "hooks:faulty", "--workers", "2")
    try:
        summary = json.loads(cli(*arguments, "--json", cwd=folder, status=1).stdout)
    finally:
        (folder / "hidden.png").rename(folder / "out" / missing)
    assert (summary["scored"], summary["errors"], summary["before"]) == (6, 3, 0)

    rows = raydiff.read_results(folder / "out", scores=True).to_pylist()
    assert len(rows) == 8
    assert "no such face" in rows[1]["faulty_error"]
    assert "hooks.py:" in rows[1]["faulty_error"]
    assert "list" in rows[2]["faulty_error"]
    assert "missing" in rows[4]["faulty_error"]
    for index in (0, 3, 5, 6):
        with Image.open(folder / "out" / rows[index]["file_name"]) as image:
            mean = np.asarray(image).mean()
        assert rows[index]["faulty_mean"] == pytest.approx(mean)
        assert rows[index]["faulty_label"] == "noise"
        assert rows[index]["faulty_is_odd"] is True
        assert rows[index]["faulty_error"] is None
    assert rows[5]["faulty_index"] == rows[6]["faulty_index"]  # one file, scored once
    assert rows[7]["status"] == "failed"
    assert rows[7]["faulty_mean"] is None

    again = json.loads(cli(*arguments, "--json", cwd=folder).stdout)
    assert (again["scored"], again["before"]) == (0, 6)
    retried = cli(*arguments, "--retry-errors", cwd=folder, status=1)
    assert "3 files scored, 2 of them with an error; 3 had been" in retried.stdout
    assert "faulty_mean" in retried.stdout
    assert raydiff.read_results(folder / "out", scores=True)["faulty_error"][4].as_py() is None
    assert "all is well" in cli("verify", "out", cwd=folder).stdout


def test_a_class_is_made_once_in_each_worker_and_takes_arguments(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "made").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    calls: list[tuple[int, int]] = []
    summary = raydiff.score(
        "out",
        "hooks:Model",
        name="scaled",
        arguments={"folder": "made", "scale": 2},
        workers=2,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert (summary.scored, summary.exit_status) == (6, 0)
    assert (calls[0], calls[-1]) == ((0, 6), (6, 6))
    assert 1 <= len(list((folder / "made").iterdir())) <= 2
    row = raydiff.read_results("out", ["file_name"], scores=True).to_pylist()[0]
    with Image.open(folder / "out" / row["file_name"]) as image:
        assert row["scaled"] == pytest.approx(2 * np.asarray(image).mean())
    other = cli(
        "score", "out", "--with", "hooks:Model", "--name", "scaled", "--set", "folder=made",
        "--set", "scale=3", cwd=folder, status=2,
    )  # fmt: skip
    assert "Choose another --name" in other.stderr
    assert "--set scale=2" in other.stderr


def test_a_worker_that_is_killed_is_replaced_and_the_file_gets_an_error(folder: Path) -> None:
    run = cli(
        "score", "out", "--with", "hooks:deadly", "--workers", "2", "--json", cwd=folder, status=1
    )
    summary = json.loads(run.stdout)
    assert (summary["scored"], summary["errors"]) == (6, 1)
    assert "died" in run.stderr
    rows = raydiff.read_results(folder / "out", scores=True).to_pylist()
    assert [row["deadly"] for row in rows] == [0, 1, 2, None, 4, 5, 5, None]
    assert "2 workers died of this file" in rows[3]["deadly_error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--with", "hook:faulty"], 'did you mean "hooks"?'),
        (["out", "--with", "nowhere.at.all:x"], "no module 'nowhere.at.all'"),
        (["out", "--with", "hooks:fulty"], 'did you mean "faulty"?'),
        (["out", "--with", "hooks"], "expected module:function"),
        (["out", "--with", "hooks:HOOK-1"], "expected module:function"),
        (["out", "--with", "hooks:three"], "(pixels, row, threshold)"),
        (["out", "--with", "hooks:faulty", "--set", "x=1"], "--set NAME=VALUE"),
        (["out", "--with", "broken_module:x"], "cannot be imported: SyntaxError"),
        (["out", "--with", "hooks:faulty", "--name", "prompt"], "a column 'prompt' already"),
        (["out", "--with", "hooks:faulty", "--name", "../x"], "letters, digits and _"),
        (["out", "--with", "hooks:faulty", "--name", "init"], "'init_image'"),
        (["gone", "--with", "hooks:faulty"], "no such folder"),
        ([".", "--with", "hooks:faulty"], "not a run"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_starts(
    folder: Path, arguments: list[str], message: str
) -> None:
    (folder / "broken_module.py").write_text("def x(:\n")
    before = sorted(folder.rglob("out/**/*"))
    assert message in cli("score", *arguments, cwd=folder, status=2).stderr
    assert sorted(folder.rglob("out/**/*")) == before


def test_a_hook_that_cannot_be_made_is_bad_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = ScoreSpec(
        out=str(folder / "out"),
        name="broken",
        hook="hooks:Broken",
        arguments={},
        import_dir=str(folder),
    )
    with pytest.raises(ConfigError, match="it could not be made: OSError: no checkpoint here"):
        asyncio.run(ScoreWorker("w0", spec).start())
