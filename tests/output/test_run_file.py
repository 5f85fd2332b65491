"""A folder takes one run: the same one goes on, any other is refused with what differs."""

import json
import os
import subprocess
import sys

import pytest

from raydiff.config import RunConfig, load_config
from raydiff.errors import EngineError, OutputError
from raydiff.output.run_file import read_run, start_run


def config_with(**changes):
    return load_config(None, {key.replace("__", "."): value for key, value in changes.items()})


def test_a_new_run_is_recorded(begin, tmp_path):
    run = begin(config=config_with(model__name="sdxl", output__image="webp"))
    assert not run.is_resumed
    values = json.loads((tmp_path / "out" / "run.json").read_text())
    assert values["manifest"] == "prompts.parquet"
    assert values["manifest_fingerprint"] == "ab" * 16
    assert values["num_rows"] == 100
    assert values["models"] == {"sdxl": "0f1e2d"}
    assert values["config"]["output"]["image"] == "webp"
    (session,) = values["sessions"]
    assert session["epoch"] == 1
    assert session["pid"] == os.getpid()
    assert {"python", "raydiff", "torch", "ray"} <= session["versions"].keys()
    assert read_run(tmp_path / "out") == run.file


def test_the_same_run_goes_on(begin, tmp_path):
    begin().close()
    run = begin()
    assert run.is_resumed
    assert [session.epoch for session in run.file.sessions] == [1, 2]
    assert run.lock.epoch == 2


ALLOWED = [
    {"engine__workers": 3},
    {"memory__profile": "extreme"},
    {"output__commit_s": 9.0},
    {"output__commit_rows": 7},
    {"output__png_compression": 9},
    {"output__quality": 50},
    {"model__compile": True},
    {"limit": 10},
]


@pytest.mark.parametrize("changes", ALLOWED, ids=lambda changes: next(iter(changes)))
def test_what_does_not_change_the_files_may_change(changes, begin):
    begin().close()
    assert begin(config=config_with(**changes)).is_resumed


REFUSED = [
    ({"config": config_with(defaults__seed=5)}, "defaults.seed was None, now is 5"),
    ({"config": config_with(defaults__height=64)}, "defaults.height was None, now is 64"),
    ({"config": config_with(model__dtype="float32")}, "model.dtype was auto, now is float32"),
    ({"config": config_with(output__image="jpg")}, "output.image was png, now is jpg"),
    (
        {"config": config_with(output__format="webdataset")},
        "output.format was files, now is webdataset",
    ),
    (
        {"config": config_with(output__strip_metadata=True)},
        "output.strip_metadata was False, now is True",
    ),
    ({"config": config_with(output__video="webm")}, "output.video was mp4, now is webm"),
    ({"config": config_with(output__crf=30)}, "output.crf was None, now is 30"),
    ({"config": config_with(output__wav=True)}, "output.wav was False, now is True"),
    (
        {"config": config_with(ltx2__mode="distilled")},
        "ltx2.mode was one_stage, now is distilled",
    ),
    ({"models": {"sdxl": "999999"}}, "revision of model sdxl was 0f1e2d, now is 999999"),
    (
        {"manifest_fingerprint": "cd" * 16, "manifest_uri": "b.parquet", "num_rows": 2_000},
        "manifest was prompts.parquet (100 rows, abababababab), "
        "now is b.parquet (2,000 rows, cdcdcdcdcdcd)",
    ),
]


@pytest.mark.parametrize(("changes", "difference"), REFUSED, ids=lambda value: str(value)[:40])
def test_another_run_is_refused_with_old_and_new_value(changes, difference, begin, tmp_path):
    begin().close()
    before = (tmp_path / "out" / "run.json").read_bytes()
    with pytest.raises(OutputError) as caught:
        begin(**changes)
    assert difference in str(caught.value)
    assert "--out" in str(caught.value)
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert begin().is_resumed  # The refused one let go of the lock.


def test_a_run_from_before_there_were_shards_or_clips_goes_on(begin, tmp_path):
    begin().close()
    path = tmp_path / "out" / "run.json"
    values = json.loads(path.read_text())
    del values["config"]["ltx2"]
    for key in ("format", "video", "codec", "crf", "preset", "wav", "video_threads"):
        del values["config"]["output"][key]
    path.write_text(json.dumps(values))
    assert begin().is_resumed


def test_quality_matters_for_jpeg(begin):
    begin(config=config_with(output__image="jpg")).close()
    with pytest.raises(OutputError, match=r"output\.quality was 95, now is 50"):
        begin(config=config_with(output__image="jpg", output__quality=50))


def test_the_same_checkpoint_under_another_path_is_the_same_model(begin):
    begin(config=config_with(model__name="./a"), models={"./a": "local-77"}).close()
    run = begin(config=config_with(model__name="/x/a"), models={"/x/a": "local-77"})
    assert run.is_resumed
    run.close()
    with pytest.raises(OutputError, match=r"model\.revision was local-77, now is local-88"):
        begin(config=config_with(model__name="/x/b"), models={"/x/b": "local-88"})


def test_models_that_rows_name_are_recorded_as_they_come(begin, tmp_path):
    run = begin()
    run.add_model("sd21", "aaaa")
    run.add_model("sd21", "aaaa")
    assert read_run(tmp_path / "out").models == {"sdxl": "0f1e2d", "sd21": "aaaa"}
    run.close()
    resumed = begin()
    with pytest.raises(OutputError, match="model sd21 was aaaa, now is bbbb"):
        resumed.add_model("sd21", "bbbb")


def test_a_driver_that_lost_the_folder_records_nothing(begin, tmp_path):
    run = begin()
    (tmp_path / "out" / ".lock").unlink()
    with pytest.raises(EngineError, match="no longer holds"):
        run.add_model("sd21", "aaaa")
    assert "sd21" not in read_run(tmp_path / "out").models


def test_credentials_stay_out_of_the_run_file(begin, tmp_path):
    config = RunConfig(manifest="https://host/x.parquet?sig=SECRET")
    begin(config=config, manifest_uri="s3://key:SECRET@bucket/x.parquet")
    text = (tmp_path / "out" / "run.json").read_text()
    assert "SECRET" not in text
    assert "s3://bucket/x.parquet" in text


def test_a_second_driver_is_refused(begin):
    begin()
    with pytest.raises(OutputError, match="another driver is at work"):
        begin()


def test_a_folder_with_other_files_is_refused(begin, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds 'thesis.tex' and is not a run"):
        begin()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_taken_and_so_is_one_that_a_crash_left_with_a_lock(begin, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("")
    assert not begin().is_resumed


def start(out_dir):
    return start_run(
        out_dir,
        config=RunConfig(),
        manifest_uri="a",
        manifest_fingerprint="b",
        num_rows=1,
        models={},
    )


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"nowhere does not exist"):
        start(tmp_path / "nowhere" / "out")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"out: File exists"):
        start(tmp_path / "out")
    with pytest.raises(OutputError, match=r"inner: Not a directory"):
        start(tmp_path / "out" / "inner")


def test_a_read_only_disk_is_named(read_only_folder):
    with pytest.raises(OutputError, match="Read-only file system"):
        start(read_only_folder / "out")
    with pytest.raises(OutputError, match="Read-only file system"):
        start(read_only_folder)


def test_a_full_disk_at_the_start_is_named_and_leaves_nothing_half(full_disk):
    (full_disk / "filler").write_bytes(b"x" * 64 * 1024)
    out = full_disk / "out"
    with pytest.raises(OutputError, match="No space left on device"):
        start(out)
    assert not (out / "run.json").exists()
    (full_disk / "filler").unlink()
    start(out).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"manifest": 3}'])
def test_a_run_file_that_is_not_one_is_named(content, begin, tmp_path):
    begin().close()
    (tmp_path / "out" / "run.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"run\.json: not a run file of raydiff"):
        begin()


def test_what_dead_writers_left_is_removed_at_the_start(begin, tmp_path):
    begin().close()
    folder = tmp_path / "out" / "images/.tmp"
    folder.mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    left = folder / f"{'ab' * 16}.{os.uname().nodename}.{child.pid}.01234567-0.tmp"
    left.write_bytes(b"half")
    begin()
    assert not left.exists()
