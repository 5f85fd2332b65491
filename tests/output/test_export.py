"""Exports load with webdataset and datasets as they are, and are whole or not taken for whole."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from raydiff.errors import ConfigError, OutputError
from raydiff.output.export.export import UNFINISHED, export_run
from raydiff.output.ledger import read_results
from raydiff.output.scores import FileScore, ScoreTable
from tests.cli.command import cli
from tests.clips import FRAME_RATE, NUM_FRAMES
from tests.output.generated_runs import clip_rows, random_pixels, write_run

pytestmark = [
    # Both libraries leave files that they read to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

COLUMNS = pa.schema(
    [
        ("subset", pa.large_string()),
        ("image", pa.int64()),
        ("source_file_name", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("info", pa.struct([("n", pa.int32()), ("ok", pa.bool_())])),
        ("pairs", pa.map_(pa.string(), pa.int64())),
    ]
)
NUM_ROWS = 25


def rows():
    for seed in range(NUM_ROWS):
        row = {
            "prompt": f"prompt {seed}, 山の写真, \"quoted\", 'single', a: b # c\n- d",
            "seed": seed,
            "subset": "test" if seed % 5 == 4 else "train",
            "image": seed * 10,
            "source_file_name": f"../../{seed}.png",
            "tags": ["a", str(seed)] if seed % 2 else None,
            "info": {"n": seed, "ok": True} if seed > 20 else None,
            "pairs": [("k", seed)],
        }
        yield row | ({"strength": 0.5, "negative_prompt": "blurry"} if seed > 12 else {})
    yield {"seed": 7, "prompt": "x", "subset": "test", "error": "it failed"}
    yield {"bad": "row 26: no prompt"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with 25 images, a failed row and a bad one."""
    out = tmp_path_factory.mktemp("runs") / "the run"
    return write_run(out, list(rows()), columns=COLUMNS, commit_every=7)


@pytest.fixture(scope="module", params=["files", "webdataset"])
def any_run(request, run, tmp_path_factory):
    """The same in files and in shards."""
    if request.param == "files":
        return run
    out = tmp_path_factory.mktemp("runs") / "in shards"
    return write_run(out, list(rows()), columns=COLUMNS, format_="webdataset")


@pytest.fixture(autouse=True)
def _datasets_stays_here(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()


def load(*args, tmp_path, **kwargs):
    return datasets.load_dataset(*args, cache_dir=str(tmp_path / "cache"), **kwargs)


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def check_pixels(image, seed: int) -> None:
    assert np.array_equal(np.asarray(image), random_pixels(seed))


def test_tars_load_with_webdataset(any_run, tmp_path):
    summary = export_run(any_run, tmp_path / "tars", to="webdataset", shard_rows=10)
    assert summary.num_samples == {"train": NUM_ROWS}
    assert summary.problems == ()
    assert names(tmp_path / "tars") == [
        "README.md",
        *(f"data/train-0000{number}.tar" for number in range(3)),
        "train.json",
    ]
    urls = str(tmp_path / "tars/data/train-{00000..00002}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert sorted(sample["json"]["seed"] for sample in samples) == list(range(NUM_ROWS))
    known = {row["request_id"]: row for row in read_results(any_run).to_pylist()}
    for sample in samples:
        seed = sample["json"]["seed"]
        check_pixels(sample["png"], seed)
        row = known[sample["__key__"]]
        assert sample["txt"] == sample["json"]["prompt"] == row["prompt"]
        assert sample["json"]["sha256"] == row["sha256"]
        assert sample["json"].get("tags") == row["tags"]
        assert "worker_id" not in sample["json"]
    shards = json.loads((tmp_path / "tars/train.json").read_text())["shardlist"]
    assert [one["nsamples"] for one in shards] == [10, 10, 5]
    for one in shards:
        assert one["filesize"] == (tmp_path / "tars" / one["url"]).stat().st_size


def test_tars_load_with_datasets(run, tmp_path):
    export_run(run, tmp_path / "tars", to="webdataset", shard_rows=10, split="subset")
    loaded = load(str(tmp_path / "tars"), tmp_path=tmp_path)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 20, "test": 5}
    for row in loaded["test"]:
        assert row["json"]["subset"] == "test"
        check_pixels(row["png"], row["json"]["seed"])


def test_tars_are_equal_bytes_each_time(run, tmp_path):
    for name in ("a", "b"):
        export_run(run, tmp_path / name, to="webdataset")
    first, second = ((tmp_path / n / "data/train-00000.tar").read_bytes() for n in ("a", "b"))
    assert first == second


def test_a_folder_loads_with_datasets(run, tmp_path):
    export_run(run, tmp_path / "folder", to="imagefolder")
    loaded = load("imagefolder", data_dir=str(tmp_path / "folder"), tmp_path=tmp_path)
    assert list(loaded) == ["train"]
    assert len(loaded["train"]) == NUM_ROWS
    for row in loaded["train"]:
        check_pixels(row["image"], row["seed"])
        assert row["image_"] == row["seed"] * 10
        assert row["source_file_name_"] == f"../../{row['seed']}.png"
        assert row["strength"] == (0.5 if row["seed"] > 12 else None)


def test_a_folder_has_the_splits_of_a_column(run, tmp_path):
    export_run(run, tmp_path / "folder", to="imagefolder", split="subset", columns=["seed", "info"])
    loaded = load(str(tmp_path / "folder"), tmp_path=tmp_path)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 20, "test": 5}
    for split, part in loaded.items():
        assert part.column_names == ["image", "seed", "info"]
        for row in part:
            check_pixels(row["image"], row["seed"])
            assert (row["seed"] % 5 == 4) == (split == "test")
            assert row["info"] == ({"n": row["seed"], "ok": True} if row["seed"] > 20 else None)


@pytest.mark.parametrize("how", ["folder", "parquet", "streaming"])
def test_parquet_loads_with_datasets(how, run, tmp_path):
    export_run(run, tmp_path / "parquet", to="hf-parquet")
    if how == "parquet":
        files = str(tmp_path / "parquet/data/*.parquet")
        loaded = load("parquet", data_files=files, tmp_path=tmp_path)
    else:
        is_streaming = how == "streaming"
        loaded = load(str(tmp_path / "parquet"), tmp_path=tmp_path, streaming=is_streaming)
    features = loaded["train"].features
    assert isinstance(features["image"], datasets.Image)
    assert features["seed"] == datasets.Value("int64")
    assert features["guidance_scale"] == datasets.Value("float64")
    assert features["tags"] == datasets.List(datasets.Value("string"))
    assert features["finished_at"] == datasets.Value("timestamp[us, tz=UTC]")
    found = list(loaded["train"])
    assert sorted(row["seed"] for row in found) == list(range(NUM_ROWS))
    known = {row["seed"]: row for row in read_results(run).to_pylist()[:NUM_ROWS]}
    for row in found:
        check_pixels(row["image"], row["seed"])
        before = known[row["seed"]]
        for name in ("prompt", "tags", "info", "strength", "negative_prompt", "request_id"):
            assert row[name] == before[name]
        assert row["image_"] == before["image"]
        assert json.loads(row["pairs"]) == [["k", row["seed"]]]


def test_parquet_can_be_streamed(tmp_path):
    """Files and row groups are small; images are not compressed once more."""
    pixels = [np.random.default_rng(n).integers(0, 256, (128, 128, 3), np.uint8) for n in range(60)]
    rows = [{"seed": n, "pixels": one} for n, one in enumerate(pixels)]
    out = write_run(tmp_path / "out", rows)
    export_run(out, tmp_path / "parquet", to="hf-parquet", max_shard_mb=1)
    paths = sorted((tmp_path / "parquet/data").iterdir())
    sizes = [path.stat().st_size for path in paths]
    assert [path.name for path in paths] == [f"train-0000{n}.parquet" for n in range(len(paths))]
    assert len(paths) > 1
    assert pq.read_metadata(paths[0]).row_group(0).column(0).compression == "UNCOMPRESSED"
    assert sum(sizes) < 1.05 * sum(read_results(out)["size_bytes"].to_pylist())
    assert sum(pq.read_metadata(path).num_rows for path in paths) == 60


def test_the_card_describes_the_dataset(run, tmp_path):
    export_run(run, tmp_path / "parquet", to="hf-parquet", split="subset")
    info = datasets.load_dataset_builder(str(tmp_path / "parquet")).info
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        "train": 20,
        "test": 5,
    }
    assert isinstance(info.features["image"], datasets.Image)
    text = (tmp_path / "parquet/README.md").read_text()
    assert text.startswith("---\nconfigs:\n")
    assert "n<1K" in text


def test_columns_are_chosen(run, tmp_path):
    export_run(run, tmp_path / "some", to="hf-parquet", columns=["prompt", "seed", "status"])
    schema = pq.read_schema(tmp_path / "some/data/train-00000.parquet")
    assert schema.names == ["image", "prompt", "seed", "status"]
    export_run(run, tmp_path / "all", to="hf-parquet")
    everything = pq.read_schema(tmp_path / "all/data/train-00000.parquet").names
    left_out = {"file_name", "member", "offset", "node", "worker_id", "denoise_s", "init_image"}
    assert not left_out & set(everything)
    assert {"request_id", "prompt", "seed", "sha256", "dtype", "subset"} <= set(everything)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["promt"]}, 'did you mean "prompt"'),
        ({"columns": ["file_name"]}, "about the files of the run"),
        ({"split": "subst"}, 'did you mean "subset"'),
        ({"split": "seed"}, "it is no text"),
        ({"split": "prompt"}, "cannot name a split"),
        ({"split": "tags"}, "it is no text"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(options, message, run, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_run(run, tmp_path / "x", to="hf-parquet", **options)
    assert not (tmp_path / "x").exists()


def test_an_image_of_several_rows_is_exported_once(tmp_path):
    rows = [{"seed": n % 3, "subset": "a"} for n in range(9)]
    out = write_run(tmp_path / "out", rows, columns=pa.schema([("subset", pa.string())]))
    assert export_run(out, tmp_path / "x", to="imagefolder").num_samples == {"train": 3}
    assert pq.read_table(tmp_path / "x/train/metadata.parquet").num_rows == 3


def test_scores_are_columns(tmp_path):
    out = write_run(tmp_path / "out", [{"seed": n} for n in range(5)])
    with ScoreTable(out, "light", hook="hooks:light", arguments={}) as table:
        for row in read_results(out).to_pylist()[1:]:
            table.add(FileScore(request_id=row["request_id"], values={"light": row["seed"] / 2}))
        table.commit()
    export_run(out, tmp_path / "x", to="hf-parquet", columns=["seed", "light"])
    found = pq.read_table(tmp_path / "x/data/train-00000.parquet").select(["seed", "light"])
    assert found.to_pylist() == [{"seed": n, "light": n / 2 if n else None} for n in range(5)]


def test_no_path_of_the_machine_is_exported(tmp_path):
    row = {"seed": 1, "model": "/home/alice/m", "model_revision": "local-1", "init_image": "/x/y"}
    out = write_run(tmp_path / "out", [row])
    export_run(out, tmp_path / "x", to="webdataset", columns=["model", "seed"])
    with tarfile.open(tmp_path / "x/data/train-00000.tar") as tar:
        (text,) = [tar.extractfile(one).read() for one in tar if one.name.endswith(".json")]
    assert json.loads(text) == {"model": "m", "seed": 1}


def test_missing_and_damaged_files_are_left_out_and_told(tmp_path):
    out = write_run(tmp_path / "out", [{"seed": n} for n in range(5)])
    paths = sorted(out.glob("images/*/*.png"))
    paths[0].unlink()
    paths[1].write_bytes(b"x" * paths[1].stat().st_size)
    summary = export_run(out, tmp_path / "x", to="hf-parquet")
    assert summary.num_samples == {"train": 3}
    assert sorted(summary.problems) == [
        f"{paths[0].relative_to(out)}: the file is missing",
        f"{paths[1].relative_to(out)}: its sha256 is not what the metadata says; raydiff verify "
        "tells more",
    ]
    assert pq.read_table(tmp_path / "x/data").num_rows == 3


def test_the_command_tells_what_it_wrote_and_left_out(tmp_path):
    columns = pa.schema([("part", pa.string())])
    rows = [{"seed": n, "part": f"part_{n % 2}"} for n in range(5)]
    out = write_run(tmp_path / "out", rows, columns=columns)
    arguments = ["export", out, "--to", "webdataset", "--split", "part", "--dest"]
    done = cli(*arguments, "x", cwd=tmp_path)
    assert "5 samples (part_0 3, part_1 2), 0.0 MB: x" in done.stdout
    sorted(out.glob("images/*/*.png"))[0].unlink()
    done = cli(*arguments, "y", cwd=tmp_path, status=1)
    assert "left out: images/" in done.stderr
    assert "4 samples" in done.stdout


# -- clips -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A run with three MP4s."""
    return write_run(tmp_path_factory.mktemp("runs") / "clips", clip_rows(range(3)))


def clip_bytes(out):
    return {row["seed"]: (out / row["file_name"]).read_bytes() for row in rows_of(out)}


def rows_of(out):
    return read_results(out).to_pylist()


def test_clips_in_tars_load_with_webdataset_and_datasets(clips, tmp_path):
    export_run(clips, tmp_path / "tars", to="webdataset")
    url = str(tmp_path / "tars/data/train-00000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert {one["json"]["seed"]: one["mp4"] for one in samples} == clip_bytes(clips)
    assert samples[0]["json"]["num_frames"] == NUM_FRAMES
    loaded = load("webdataset", data_files=url, split="train", tmp_path=tmp_path)
    assert isinstance(loaded.features["mp4"], datasets.Video)
    undecoded = loaded.cast_column("mp4", datasets.Video(decode=False))
    assert {one["json"]["seed"]: one["mp4"]["bytes"] for one in undecoded} == clip_bytes(clips)


def test_clips_in_folders_load_with_datasets(clips, tmp_path):
    export_run(clips, tmp_path / "films", to="imagefolder")
    assert 'load_dataset("videofolder"' in (tmp_path / "films/README.md").read_text()
    loaded = load("videofolder", data_dir=str(tmp_path / "films"), split="train", tmp_path=tmp_path)
    assert isinstance(loaded.features["video"], datasets.Video)
    undecoded = loaded.cast_column("video", datasets.Video(decode=False))
    found = {one["seed"]: Path(one["video"]["path"]).read_bytes() for one in undecoded}
    assert found == clip_bytes(clips)
    assert undecoded[0]["stg_blocks"] == [29]


def test_clips_in_parquet_load_with_datasets(clips, tmp_path):
    export_run(clips, tmp_path / "rows", to="hf-parquet")
    loaded = load(str(tmp_path / "rows"), split="train", tmp_path=tmp_path)
    assert isinstance(loaded.features["video"], datasets.Video)
    undecoded = loaded.cast_column("video", datasets.Video(decode=False))
    assert {one["seed"]: one["video"]["bytes"] for one in undecoded} == clip_bytes(clips)
    assert {one["duration_s"] for one in undecoded} == {NUM_FRAMES / FRAME_RATE}


def test_gifs_are_images_to_datasets(tmp_path):
    out = write_run(tmp_path / "out", clip_rows(range(2)), video="gif")
    export_run(out, tmp_path / "gifs", to="imagefolder")
    loaded = load("imagefolder", data_dir=str(tmp_path / "gifs"), split="train", tmp_path=tmp_path)
    assert [one["image"].n_frames for one in loaded] == [NUM_FRAMES] * 2


def test_clips_that_a_format_cannot_hold_are_refused(tmp_path):
    webm = write_run(tmp_path / "webm", clip_rows(range(1)), video="webm")
    with pytest.raises(ConfigError, match=r"takes no \.webm\. Use --to webdataset"):
        export_run(webm, tmp_path / "x", to="imagefolder")
    mixed = write_run(tmp_path / "mixed", [{"seed": 9}, *clip_rows(range(1))])
    with pytest.raises(ConfigError, match=r"images and videos\. Use --to webdataset"):
        export_run(mixed, tmp_path / "y", to="imagefolder")
    frames = write_run(tmp_path / "frames", clip_rows(range(1)), video="frames")
    with pytest.raises(OutputError, match=r"folders of frames .* Render them as mp4"):
        export_run(frames, tmp_path / "z", to="webdataset")


def test_images_have_no_columns_of_clips(run, tmp_path):
    export_run(run, tmp_path / "rows", to="hf-parquet")
    names_there = pq.read_table(tmp_path / "rows/data").column_names
    assert not {"num_frames", "stg_blocks", "duration_s", "nfe"} & set(names_there)


# -- whole or not ----------------------------------------------------------------------------------


def test_a_folder_with_anything_in_it_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds 'notes\.txt' already"):
        export_run(run, tmp_path / "mine", to="webdataset")
    export_run(run, tmp_path / "x", to="webdataset")
    before = names(tmp_path / "x")
    with pytest.raises(OutputError, match=r"already\. Choose a new"):
        export_run(run, tmp_path / "x", to="webdataset")
    assert names(tmp_path / "x") == before
    with pytest.raises(OutputError, match="does not exist"):
        export_run(run, tmp_path / "no/such/folder", to="webdataset")


def test_a_part_of_another_export_is_refused(run, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / UNFINISHED).write_text('{"manifest_fingerprint": "other"}')
    with pytest.raises(OutputError, match="another run's export"):
        export_run(run, tmp_path / "x", to="webdataset")


def test_a_strange_file_in_an_unfinished_export_is_not_removed(run, tmp_path):
    stop_half_way(run, tmp_path / "x", "webdataset")
    (tmp_path / "x/data/mine.tar").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds 'data/mine\.tar' already"):
        export_run(run, tmp_path / "x", to="webdataset")
    assert (tmp_path / "x/data/mine.tar").read_text() == "mine"


class StopError(Exception):
    """Raised in the middle of an export."""


def stop_half_way(run, dest, to, **options):
    def stop(num_done, num_samples):
        raise StopError

    with pytest.raises(StopError):
        export_run(run, dest, to=to, on_progress=stop, **options)


@pytest.mark.parametrize("to", ["webdataset", "imagefolder", "hf-parquet"])
def test_an_interrupted_export_is_begun_anew(to, run, tmp_path):
    stop_half_way(run, tmp_path / "x", to)
    assert UNFINISHED in names(tmp_path / "x")
    assert not [name for name in names(tmp_path / "x") if ".tmp" in name or "README" in name]
    export_run(run, tmp_path / "x", to=to, split="subset")
    export_run(run, tmp_path / "y", to=to, split="subset")
    assert names(tmp_path / "x") == names(tmp_path / "y")
    for name in names(tmp_path / "x"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_a_killed_export_is_never_taken_for_a_whole_one(tmp_path):
    out = write_run(tmp_path / "out", [{"seed": n} for n in range(300)])
    command = [sys.executable, "-m", "raydiff", "export", str(out), "--to", "webdataset"]
    command += ["--dest", str(tmp_path / "x"), "--shard-rows", "20"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("x/data/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = names(tmp_path / "x")
    assert (UNFINISHED in found) != ("README.md" in found and process.returncode == 0)
    for path in tmp_path.glob("x/data/[!.]*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 60
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "300 samples" in done.stdout
    assert UNFINISHED not in names(tmp_path / "x")
    urls = str(tmp_path / "x/data/train-{00000..00014}.tar")
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False))) == 300


def test_a_run_without_images_is_refused(tmp_path):
    out = write_run(tmp_path / "out", [{"error": "no", "seed": 1}])
    with pytest.raises(OutputError, match="no completed image"):
        export_run(out, tmp_path / "x", to="webdataset")


def test_an_image_is_what_it_was(any_run, tmp_path):
    """Not a pixel is encoded again: the bytes are those of the run."""
    export_run(any_run, tmp_path / "x", to="imagefolder")
    for row in read_results(any_run).to_pylist()[:NUM_ROWS]:
        one = row["request_id"]
        data = (tmp_path / f"x/train/{one[:2]}/{one}.png").read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert Image.open(io.BytesIO(data)).size == (48, 32)
