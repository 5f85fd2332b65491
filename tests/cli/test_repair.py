"""A run is repaired and proved: failed rows made again, images made again from their metadata."""

import hashlib
import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raydiff
from raydiff.engine.plan import plan
from raydiff.engine.recorded_run import recorded_config
from raydiff.engine.rerender import Rerenderer
from raydiff.errors import ConfigError, InputError, ModelError
from raydiff.output.row_samples import find_request, sample_requests
from tests.cli.command import cli
from tests.output.old_runs import make_old

ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat"},
    {"prompt": "a dog", "init_image": "late.png", "strength": 0.5},
    {"prompt": "a hen", "height": 63},
    {"prompt": "a cow", "guidance_scale": 3.0},
]


@pytest.fixture(scope="module")
def folder(tiny_sd21: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `out`, of which one row failed for its init image and one for its height."""
    folder = tmp_path_factory.mktemp("repair")
    shutil.copytree(tiny_sd21, folder / "model")
    names = dict.fromkeys(name for row in ROWS for name in row)
    columns = {name: [row.get(name) for row in ROWS] for name in names}
    pq.write_table(pa.table(columns | {"num_inference_steps": [2] * 4}), folder / "rows.parquet")
    cli("render", "rows.parquet", "--model", "model", "--out", "out", cwd=folder, status=1)
    dry = cli("retry-failed", "out", "--dry-run", cwd=folder).stdout
    assert "row 1: failed: row 1: init_image" in dry
    assert "2 failed" in dry
    found = cli("retry-failed", "out", "--dry-run", "--matching", "HEIGHT", "--json", cwd=folder)
    assert [row["row_index"] for row in json.loads(found.stdout)] == [2]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "late.png")
    cli("retry-failed", "out", cwd=folder, status=1)
    return folder


def results(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = raydiff.read_results(folder / "out").to_pylist()
    return rows


def test_failed_rows_are_made_again_and_no_others(folder: Path) -> None:
    rows = results(folder)
    assert [row["status"] for row in rows] == ["completed", "completed", "failed", "completed"]
    assert rows[1]["init_image_sha256"] is not None
    assert rows[1]["finished_at"] > max(rows[0]["finished_at"], rows[3]["finished_at"])
    assert "4 rows, 3 files checked: all is well" in cli("verify", "out", cwd=folder).stdout


def test_an_image_is_reproduced_byte_for_byte(folder: Path) -> None:
    row = results(folder)[0]
    run = cli("reproduce", "out", row["request_id"][:12], "--to", "again.png", cwd=folder)
    assert "equal, byte for byte" in run.stdout
    assert (folder / "again.png").read_bytes() == (folder / "out" / row["file_name"]).read_bytes()
    run = cli("verify", "out", "--rerender", "100%", cwd=folder)
    assert "3 rendered again: 3 equal byte for byte, 0 within" in run.stdout
    assert "nothing like" not in run.stdout
    cli("verify", "out", "--rerender", "0%", cwd=folder, status=2)


def test_a_run_of_an_older_version_is_reproduced_and_has_nothing_left_to_do(
    folder: Path, tmp_path: Path
) -> None:
    old = make_old(Path(shutil.copytree(folder / "out", tmp_path / "out")), "before clips")
    rows = sample_requests(old, share=1.0, number=1, seed=0).to_pylist()
    assert len(rows) == 3
    rerenderer = Rerenderer(old, model=str(folder / "model"))
    assert all(rerenderer.render(row).is_equal for row in rows)
    with chdir(folder):
        report = plan(recorded_config(old))
    assert (report.num_images, report.num_done, report.num_new) == (4, 4, 0)


def test_another_image_than_the_metadata_makes_is_found(folder: Path, tmp_path: Path) -> None:
    """As if the run had written it: the file and its row agree with one another."""
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    row = results(folder)[0]
    path = out / row["file_name"]
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[0, 0, 0] ^= 128
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    claim = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    replace_claim(out, row["row_index"], claim)
    run = cli("verify", out, "--rerender", "5", "--json", cwd=folder, status=1)
    (found,) = (json.loads(line) for line in run.stdout.splitlines())
    assert (found["kind"], found["row_index"]) == ("different_render", 0)
    assert (found["max_abs"], found["is_equal"]) == (128, False)
    made = Rerenderer(out, model=str(folder / "model")).render(find_request(out, row["request_id"]))
    assert (made.sha256, made.max_abs) == (row["sha256"], 128)


def replace_claim(out: Path, row_index: int, claim: dict[str, Any]) -> None:
    """Change what the metadata says of a row."""
    for part in (out / "metadata").glob("*.parquet"):
        table = pq.read_table(part)
        is_row = pc.equal(table["row_index"], row_index)
        for name, value in claim.items():
            place = table.schema.get_field_index(name)
            changed = pc.if_else(
                is_row, pa.scalar(value, table.schema.field(name).type), table[name]
            )
            table = table.set_column(place, table.schema.field(name), changed)
        pq.write_table(table, part)


def test_what_is_gone_or_changed_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("out", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    rows = sample_requests(tmp_path / "out", share=1.0, number=1, seed=0).to_pylist()
    rows.sort(key=lambda row: row["row_index"])
    rerenderer = Rerenderer(tmp_path / "out", model=str(tmp_path / "model"))
    failed = {**rows[0], "status": "failed", "error": "no"}
    with pytest.raises(InputError, match="retry-failed"):
        rerenderer.render(failed)
    with pytest.raises(InputError, match="its columns give"):
        rerenderer.render({**rows[0], "seed": 5})
    picture = folder / "late.png"
    before = picture.read_bytes()
    try:
        Image.new("RGB", (64, 64)).save(picture)
        with pytest.raises(InputError, match=r"late\.png has the sha256 .* it had"):
            rerenderer.render(rows[1])
        picture.unlink()
        with pytest.raises(InputError, match=r"late\.png.*No such file"):
            rerenderer.render(rows[1])
    finally:
        picture.write_bytes(before)
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ModelError, match="Put the old files back"):
        rerenderer.render(rows[0])


def test_a_recorded_run_takes_changes_and_reaches_its_last_row(folder: Path) -> None:
    out = folder / "out"
    config = recorded_config(out, {"memory.profile": "gpu_poor", "model.name": "elsewhere"})
    assert (config.memory.profile, config.model.name) == ("gpu_poor", "elsewhere")
    assert (config.manifest, config.out, config.limit) == ("rows.parquet", str(out), None)
    with pytest.raises(ConfigError, match=r"engine\.wrokers"):
        recorded_config(out, {"engine.wrokers": 2})


def test_a_limit_of_the_first_session_does_not_hold_back_later_rows(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    values = json.loads((out / "run.json").read_text())
    values["config"]["limit"] = 2
    (out / "run.json").write_text(json.dumps(values))
    assert recorded_config(out).limit == 4
