"""The commands on a run in an object store."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.object_storage import ObjectStorage
from tests.cli.command import cli
from tests.s3_server import FaultyS3

SETTINGS = ("--set", "defaults.num_inference_steps=1", "--set", "engine.workers=1")


def test_a_run_is_rendered_and_looked_at(tmp_path: Path, s3: FaultyS3, tiny_sd21: Path) -> None:
    storage = ObjectStorage(s3.new_uri())
    pq.write_table(pa.table({"prompt": ["a fox", "an owl", "a fox"]}), tmp_path / "m.parquet")
    storage.put_file("m.parquet", tmp_path / "m.parquet")
    manifest, out = storage.describe("m.parquet"), storage.describe("out")

    said = cli(
        "render", manifest, "--out", out, "--model", tiny_sd21, *SETTINGS, cwd=tmp_path
    ).stdout
    assert "3 completed; 3 in this session" in said
    assert f"Files and metadata: {out}" in said
    assert json.loads(cli("status", out, "--json", cwd=tmp_path).stdout)["state"] == "finished"
    assert "3 rows, 3 files checked: all is well" in cli("verify", out, cwd=tmp_path).stdout
    query = "SELECT count(*) AS n FROM results WHERE status = 'completed'"
    assert cli("query", out, query, cwd=tmp_path).stdout.split() == ["n", "3"]
    said = cli("sheet", out, "--out", tmp_path / "sheet.png", cwd=tmp_path)
    assert "1 page, 3 results" in said.stdout
    assert "without a picture" not in said.stderr
    assert "3 in both: 3 equal" in cli("diff", out, out, cwd=tmp_path).stdout
    said = cli("gallery", out, cwd=tmp_path, status=2)
    assert f"aws s3 sync {out} FOLDER" in said.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.parquet", "sheet.png"]
    checks = json.loads(cli("doctor", "--out", out, "--json", cwd=tmp_path).stdout)
    (check,) = (check for check in checks if check["name"] == "object store")
    assert (check["state"], check["detail"]) == ("ok", f"{out} can be written")


def test_what_cannot_be_used_is_refused_before_anything_starts(
    tmp_path: Path, s3: FaultyS3, tiny_sd21: Path
) -> None:
    pq.write_table(pa.table({"prompt": ["a fox"]}), tmp_path / "m.parquet")
    for out, said in [
        ("s3://no-such-bucket/run", "Make the bucket, or correct its name (s3://no-such-bucket)"),
        ("s3://key:secret@bucket/run", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the"),
    ]:
        run = cli("render", "m.parquet", "--out", out, "--model", tiny_sd21, cwd=tmp_path, status=2)
        assert said in run.stderr
        assert "secret@" not in run.stderr
    assert not (tmp_path / "s3:").exists()
