"""The gallery's files: data that says what the metadata says, thumbnails made once, bad input."""

import json
import os
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raydiff.errors import OutputError
from raydiff.output.gallery.build import Gallery
from raydiff.output.gallery.chunks import chunk_script, describe_columns, plain_columns
from raydiff.output.gallery.thumbnails import thumbnail
from raydiff.output.storage import open_storage
from tests.gallery_run import (
    image_bytes,
    picture,
    put,
    request_id,
    video_bytes,
    write_rows,
    write_run,
)

CALL = re.compile(r"(\w+)\((?:'([0-9a-f]+\.js)',)?'(.*)'\)\n", re.DOTALL)


def read_script(path: Path) -> dict[str, Any]:
    """Read a data script as a browser does."""
    match = CALL.fullmatch(path.read_bytes().decode("ascii"))
    assert match is not None
    assert match[2] in (None, path.name)
    value: dict[str, Any] = json.loads(match[3].replace("\\'", "'").replace("\\\\", "\\"))
    return value


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that a page would show, what is wrong with their files under "flaw"."""
    status = read_script(folder / "data" / "status.js")
    rows = []
    for name in status["chunks"]:
        chunk = read_script(folder / "data" / name)
        every = {**chunk["columns"], "flaw": chunk["flaws"]}
        columns = {key: cells(one, chunk["rows"]) for key, one in every.items()}
        rows += [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    assert len(rows) == status["num_rows"]
    return rows


def cells(column: dict[str, Any], num_rows: int) -> list[Any]:
    if "constant" in column:
        return [column["constant"]] * num_rows
    if "codes" in column:
        return [None if code < 0 else column["values"][code] for code in column["codes"]]
    values: list[Any] = column["values"]
    return values


def write_images(out: Path, numbers: range) -> None:
    for number in numbers:
        one = request_id(number)
        put(out, f"images/{one[:2]}/{one}.png", image_bytes(picture(number)))


def test_the_page_gets_every_value_exactly(tmp_path: Path) -> None:
    rows = [
        {"prompt": "'quotes' \"and\" \\ </script>\n\u2028 ثعلب 🏔", "seed": 2**63 - 1, "note": None},
        {"prompt": "plain", "seed": 2**53 - 1, "note": 0.1},
        {"prompt": "plain", "seed": 0, "note": float("-inf")},
        {"prompt": None, "status": "failed", "error": "row 3: no prompt", "file_name": None},
    ]
    out = write_rows(tmp_path / "out", rows)
    write_images(out, range(3))
    Gallery(out).refresh()
    shown = read_rows(out / "gallery")
    assert [row["prompt"] for row in shown] == [row["prompt"] for row in rows]
    assert [row["seed"] for row in shown] == [str(2**63 - 1), 2**53 - 1, 0, 7]
    assert [row["note"] for row in shown] == [None, 0.1, "-Infinity", None]
    assert [row["error"] for row in shown] == [None, None, None, "row 3: no prompt"]
    assert [row["flaw"] for row in shown] == [None] * 4
    status = read_script(out / "gallery" / "data" / "status.js")
    described = {column["name"]: column for column in status["columns"]}
    assert described["status"]["choices"] == [["completed", 3], ["failed", 1]]
    assert described["note"]["group"] == "own"
    assert described["seed"]["kind"] == "integer"


def test_columns_of_every_type_become_plain() -> None:
    moment = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
    table = pa.table(
        {
            "half": pa.array([0.1, None], pa.float32()),
            "money": pa.array([Decimal("1.50"), None]),
            "when": pa.array([moment, None]),
            "day": pa.array([moment.date(), None]),
            "tags": pa.array([["a", "é"], None]),
            "deep": pa.array([{"a": 1, "t": moment}, None]),
            "raw": pa.array([b"\xff\x00", None]),
            "kind": pa.array(["x", None]).dictionary_encode(),
            "flag": pa.array([True, None]),
            "big": pa.array([2**64 - 1, None], pa.uint64()),
            "nothing": pa.nulls(2),
            "bad text": pa.Array.from_buffers(
                pa.string(), 2, pa.array([b"caf\xe9", None], pa.binary()).buffers()
            ),
        }
    )
    plain, kinds = plain_columns(table)
    first = {name: plain[name][0].as_py() for name in plain.column_names}
    assert first == {
        "half": 0.1,
        "money": 1.5,
        "when": "2026-01-31T12:00:00.123+00:00",
        "day": "2026-01-31",
        "tags": '["a", "é"]',
        "deep": '{"a": 1, "t": "2026-01-31 12:00:00.123456+00:00"}',
        "raw": "2 bytes",
        "kind": "x",
        "flag": True,
        "big": 2**64 - 1,
        "nothing": None,
        "bad text": "caf\ufffd",
    }
    assert all(plain[name][1].as_py() is None for name in plain.column_names)
    assert (kinds["tags"], kinds["flag"], kinds["half"]) == ("json", "boolean", "number")
    name, script = chunk_script(plain, pa.nulls(2))
    assert script.startswith(f"receiveChunk('{name}',".encode())
    described = {one["name"]: one for one in describe_columns(plain, kinds)}
    assert described["big"]["choices"] == [(str(2**64 - 1), 1), (None, 1)]


def test_a_second_call_makes_only_what_is_new(tmp_path: Path) -> None:
    num_rows = 12_000
    ids = [request_id(row % 40) for row in range(num_rows)]
    columns = {
        "row_index": np.arange(num_rows),
        "request_id": ids,
        "file_name": [f"images/{one[:2]}/{one}.png" for one in ids],
        "prompt": [f"prompt {row}" for row in range(num_rows)],
    }
    out = write_run(tmp_path / "out", columns)
    write_images(out, range(40))
    first = Gallery(out).refresh()
    assert (first.num_rows, first.num_made, first.problems) == (num_rows, 40, ())
    folder = out / "gallery"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert Gallery(out).refresh().num_made == 0
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert after == before

    write_run(out, {"row_index": [num_rows], "prompt": ["the last"]}, sequence=2)
    write_images(out, range(num_rows, num_rows + 1))
    assert Gallery(out).refresh().num_made == 1
    changed = {
        path.parent.name if path.suffix == ".jpg" else path.name
        for path in folder.rglob("*.*")
        if before.get(path) != path.stat().st_mtime_ns
    }
    new_chunk = read_script(folder / "data" / "status.js")["chunks"][-1]
    assert changed == {"status.js", new_chunk, request_id(num_rows)[:2]}
    assert read_rows(folder)[-1]["prompt"] == "the last"
    assert len(list((folder / "data").iterdir())) == 4


def test_missing_and_broken_files_are_told_and_tried_again(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "out", [{"prompt": str(number)} for number in range(5)])
    names = [f"images/{request_id(n)[:2]}/{request_id(n)}.png" for n in range(5)]
    whole = image_bytes(picture(1, 256))
    put(out, names[1], whole)
    put(out, names[2], whole[: len(whole) // 2])
    put(out, names[3], b"<html>not an image</html>")
    put(out, names[4], b"")
    found = Gallery(out).refresh()
    assert found.num_made == 1
    assert [problem.split(":")[0] for problem in found.problems] == [names[n] for n in (0, 2, 3, 4)]
    flaws = [row["flaw"] for row in read_rows(out / "gallery")]
    assert flaws[0] == "the file is missing"
    assert flaws[1] is None
    assert "truncated" in flaws[2]
    assert flaws[3] == flaws[4] == "the file is not an image"
    put(out, names[0], whole)
    assert Gallery(out).refresh().num_made == 1
    assert read_rows(out / "gallery")[0]["flaw"] is None


@pytest.mark.parametrize("file_name", ["../secret.png", "/etc/hosts", "images/../../secret.png"])
def test_files_outside_the_run_are_not_read(file_name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(picture(1)))
    out = write_rows(tmp_path / "out", [{"prompt": "a", "file_name": file_name}])
    found = Gallery(out).refresh()
    assert found.problems == (f"{file_name}: the file name leads out of the run's folder",)
    assert not list((out / "gallery").rglob("*.jpg"))


def test_thumbnails_look_like_their_pictures(tmp_path: Path) -> None:
    pixels = picture(3, 1024)
    pixels[:512] = 255 - pixels[:512]
    see_through = np.dstack([pixels, np.full((1024, 1024), 0, np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.jpg", quality=95)
    Image.fromarray(pixels[:, :512]).save(tmp_path / "c.webp", lossless=True)
    Image.fromarray(see_through).save(tmp_path / "d.png")
    Image.fromarray(pixels).quantize(64).save(tmp_path / "e.gif")
    (tmp_path / "f.webm").write_bytes(video_bytes(3))
    shown = {}
    for path in sorted(tmp_path.iterdir()):
        data = thumbnail(open_storage(tmp_path), {"file_name": path.name})
        assert len(data) < 30_000
        (tmp_path / "out.jpg").write_bytes(data)
        with Image.open(tmp_path / "out.jpg") as image:
            shown[path.suffix + path.stem] = np.asarray(image).astype(float)
        (tmp_path / "out.jpg").unlink()
    small = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)).astype(
        float
    )
    for name in (".pnga", ".jpgb", ".gife"):
        assert shown[name].shape == (256, 256, 3)
        assert np.abs(shown[name] - small).mean() < 8, name
    assert shown[".webpc"].shape == (256, 128, 3)
    assert shown[".pngd"].min() > 250  # nothing over white
    assert shown[".webmf"].shape == (64, 64, 3)
    assert shown[".webmf"].std() > 5


def test_a_folder_elsewhere_links_back(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "my run #1", [{"prompt": "a"}])
    write_images(out, range(1))
    Gallery(out, tmp_path / "site").refresh()
    assert read_script(tmp_path / "site" / "data" / "status.js")["root"] == "../my%20run%20%231/"
    assert not (out / "gallery").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "out", [{"prompt": "a"}])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my page")
    for folder in (
        tmp_path / "mine",
        out,
        tmp_path / "gone" / "deep",
        tmp_path / "mine/index.html",
    ):
        with pytest.raises(OutputError, match="gallery folder"):
            Gallery(out, folder)
    assert (tmp_path / "mine" / "index.html").read_text() == "my page"
    with pytest.raises(OutputError, match="not a run"):
        Gallery(tmp_path / "mine")


def test_a_run_without_results_has_a_page(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", {"row_index": pa.array([], pa.int64())})
    found = Gallery(out).refresh()
    assert (found.num_rows, found.num_made) == (0, 0)
    assert read_rows(out / "gallery") == []
    assert found.page.is_file()


def test_thumbnails_that_take_too_long_come_next_time(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "out", [{"prompt": str(number)} for number in range(300)])
    write_images(out, range(300))
    gallery = Gallery(out)
    first = gallery.refresh(thumbnails_s=0.0)
    assert first.num_pending == 300 - first.num_made
    assert sum(row["flaw"] == "" for row in read_rows(out / "gallery")) == first.num_pending > 0
    assert gallery.refresh().num_pending == 0
    assert all(row["flaw"] is None for row in read_rows(out / "gallery"))


def test_nothing_temporary_is_left(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "out", [{"prompt": "a"}])
    write_images(out, range(1))
    Gallery(out).refresh()
    for folder, _, names in os.walk(out / "gallery"):
        assert not [name for name in names if name.startswith(".")], folder


def test_the_page_forbids_everything_but_its_own_files(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "out", [{"prompt": "a", "file_name": None, "status": "failed"}])
    page = Gallery(out).refresh().page.read_text("utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy.replace("https", "")
    assert not re.search(r"\son\w+=|<style|style=|<script(?![^>]*src=)", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all((out / "gallery" / name).is_file() for name in sources)
    for script in (out / "gallery").glob("*.js"):
        text = script.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
