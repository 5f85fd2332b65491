"""Two runs compared: every outcome, matching by other columns, videos, and flat memory."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.errors import ConfigError, OutputError
from raydiff.output.diff import RunDiff, difference_table
from raydiff.output.ledger import read_results
from raydiff.output.similarity import FrameComparison
from tests.output.generated_runs import random_pixels, write_run, write_video

COLUMNS = pa.schema([("page", pa.int64())])


def nudged(pixels: np.ndarray, by: int) -> np.ndarray:
    """Move one channel of one pixel."""
    changed = pixels.copy()
    changed[0, 0, 0] = (int(changed[0, 0, 0]) + by) % 256
    return changed


def test_every_outcome(tmp_path: Path) -> None:
    rows = [{"seed": seed} for seed in range(8)]
    left_rows = [*rows, {"seed": 8, "error": "x"}, {"seed": 9, "error": "x"}, {"bad": "no prompt"}]
    left_rows.append({"seed": 20})
    right_rows = [dict(row) for row in rows]
    right_rows += [{"seed": 8}, {"seed": 9, "error": "y"}, {"bad": "no prompt"}, {"bad": "x"}]
    right_rows += [{"seed": 21}, {"seed": 22}]
    right_rows[1]["pixels"] = nudged(random_pixels(1), 3)
    right_rows[2]["pixels"] = random_pixels(99)
    right_rows[3]["pixels"] = random_pixels(3, height=24)
    left = write_run(tmp_path / "left", left_rows)
    right = write_run(tmp_path / "right", right_rows)
    files = read_results(right)["file_name"].to_pylist()
    (right / files[4]).unlink()
    (right / files[5]).write_bytes((right / files[5]).read_bytes()[:-9])
    broken = bytearray((left / files[2]).read_bytes())

    run_diff = RunDiff(left, right, num_threads=2)
    found = {one.left_row: one for one in run_diff if one.left_row is not None}
    assert run_diff.counts == {
        "equal": 3,
        "both_failed": 1,
        "different": 2,
        "different_size": 1,
        "missing_file": 1,
        "broken_file": 1,
        "one_failed": 1,
        "only_left": 1,
        "only_right": 2,
    }
    assert not run_diff.is_same
    assert run_diff.num_without_key == (1, 2)
    assert found[1].similarity.max_abs in (3, 253)
    assert found[3].message == "48x32 and 48x24"
    assert files[4] in found[4].message
    assert found[4].message.startswith("right")
    assert "bytes" in found[5].message
    assert found[8].message == "left failed: x"
    assert (found[11].outcome, found[11].right_row) == ("only_left", None)
    expected = FrameComparison()
    expected.add(random_pixels(2), random_pixels(99))
    assert found[2].similarity == expected.result()

    broken[len(broken) // 2] ^= 0xFF  # the size stays, a checksum of the PNG does not
    (left / files[2]).write_bytes(broken)
    again = RunDiff(left, right)
    (difference,) = [one for one in again if one.left_row == 2]
    assert difference.outcome == "broken_file"
    assert difference.message.startswith(f"left {files[2]}")


def test_a_run_equals_itself_and_a_copy_in_other_bytes(tmp_path: Path) -> None:
    rows = [{"seed": seed} for seed in range(5)] + [{"bad": "no prompt"}]
    left = write_run(tmp_path / "left", rows)
    assert list(RunDiff(left, left)) == []
    shutil.copytree(left, tmp_path / "right")
    metadata = next((tmp_path / "right" / "metadata").glob("part-*.parquet"))
    table = pq.read_table(metadata)
    hashes = [None if one is None else "0" * 64 for one in table["sha256"].to_pylist()]
    pq.write_table(
        table.set_column(table.column_names.index("sha256"), "sha256", [hashes]), metadata
    )
    run_diff = RunDiff(left, tmp_path / "right")
    assert list(run_diff) == []
    assert run_diff.is_same
    assert run_diff.counts == {"equal": 5}


def test_two_models_are_matched_by_other_columns(tmp_path: Path) -> None:
    rows = [{"seed": seed, "prompt": prompt} for prompt in "ab" for seed in range(3)]
    left = write_run(tmp_path / "left", rows)
    right_rows = [{**row, "model": "sd21", "pixels": random_pixels(row["seed"])} for row in rows]
    right_rows[4]["pixels"] = nudged(random_pixels(1), 100)
    right_rows[5]["seed"] = 77
    right = write_run(tmp_path / "right", list(reversed(right_rows)))
    assert RunDiff(left, right).num_pairs == 0
    run_diff = RunDiff(left, right, on=("prompt", "seed"))
    found = {tuple(one.key.values()): one for one in run_diff}
    assert run_diff.counts == {"equal": 4, "different": 1, "only_left": 1, "only_right": 1}
    assert found["b", 1].similarity.max_abs in (100, 156)
    assert (found["b", 1].left_row, found["b", 1].right_row) == (4, 1)
    assert found["b", 2].outcome == "only_left"
    assert found["b", 77].outcome == "only_right"


def test_key_columns_of_different_types_match(tmp_path: Path) -> None:
    left = write_run(tmp_path / "left", [{"seed": 1, "page": 7}], columns=COLUMNS)
    floats = pa.schema([("page", pa.float64())])
    right = write_run(tmp_path / "right", [{"seed": 2, "page": 7.0}], columns=floats)
    run_diff = RunDiff(left, right, on=("page",))
    (difference,) = run_diff
    assert difference.outcome == "different"


def test_keys_that_do_not_tell_requests_apart_are_refused(tmp_path: Path) -> None:
    rows = [{"seed": 1, "guidance_scale": scale} for scale in (3.0, 5.0)]
    run = write_run(tmp_path / "run", rows)
    with pytest.raises(ConfigError, match=r"prompt, seed: rows 0 and 1 .* Add a column"):
        RunDiff(run, run, on=("prompt", "seed"))
    twins = write_run(tmp_path / "twins", [{"seed": 1}, {"seed": 1}])
    assert RunDiff(twins, twins, on=("prompt", "seed")).num_pairs == 1


def test_bad_input(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"seed": 1}])
    with pytest.raises(ConfigError, match='did you mean "prompt"'):
        RunDiff(run, run, on=("promt",))
    with pytest.raises(OutputError, match="not a run"):
        RunDiff(run, tmp_path)


def test_a_file_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    left = write_run(tmp_path / "left", [{"seed": 1}])
    shutil.copytree(left, tmp_path / "right")
    (tmp_path / "secret.png").write_bytes(b"x")
    metadata = next((tmp_path / "right" / "metadata").glob("part-*.parquet"))
    table = pq.read_table(metadata)
    place = table.column_names.index("file_name")
    pq.write_table(table.set_column(place, "file_name", [["../secret.png"]]), metadata)
    (difference,) = RunDiff(left, tmp_path / "right")
    assert difference.outcome == "broken_file"
    assert "leads out" in difference.message


@pytest.fixture
def film_run(tmp_path: Path):
    """Write a run whose only result is the video that a function writes."""

    def write(name: str, make, **options) -> Path:
        out = write_run(tmp_path / name, [{"seed": 1}])
        metadata = next((out / "metadata").glob("part-*.parquet"))
        table = pq.read_table(metadata)
        (out / "videos").mkdir()
        make(out / "videos" / "film.mp4", **options)
        size = (out / "videos" / "film.mp4").stat().st_size
        changes = {"file_name": "videos/film.mp4", "size_bytes": size, "sha256": name.ljust(64)}
        for column, value in changes.items():
            place = table.column_names.index(column)
            values = pa.array([value], table.schema.field(column).type)
            table = table.set_column(place, column, values)
        pq.write_table(table, metadata)
        return out

    return write


def test_videos_are_compared_frame_by_frame(film_run) -> None:
    frames = [random_pixels(seed) for seed in range(6)]
    changed = [*frames[:4], nudged(frames[4], 90), frames[5]]
    one = film_run("one", write_video, frames=frames)
    same = film_run("same", write_video, frames=frames)
    other = film_run("other", write_video, frames=changed)
    assert list(RunDiff(one, same)) == []
    (difference,) = RunDiff(one, other)
    assert difference.similarity.max_abs in (90, 166)
    mean_squared = difference.similarity.max_abs**2 / (6 * frames[0].size)
    assert difference.similarity.psnr == pytest.approx(10 * math.log10(65025 / mean_squared))


def test_videos_that_cannot_be_compared(film_run, tmp_path: Path) -> None:
    frames = [random_pixels(seed) for seed in range(6)]
    one = film_run("one", write_video, frames=frames)
    shorter = film_run("shorter", write_video, frames=frames[:5])
    smaller = film_run("smaller", write_video, frames=[pixels[:16] for pixels in frames])
    loud = film_run("loud", write_video, frames=frames, tone_hz=440)
    louder = film_run("louder", write_video, frames=frames, tone_hz=880)
    broken = film_run("broken", lambda path: path.write_bytes(b"not a video" * 50))
    image = write_run(tmp_path / "image", [{"seed": 1}])
    said = {}
    for name, other in (
        ("shorter", shorter),
        ("smaller", smaller),
        ("broken", broken),
        ("image", image),
        ("loud", loud),
    ):
        (difference,) = RunDiff(one, other)
        said[name] = (difference.outcome, difference.message)
    assert said["shorter"] == ("different_size", "the left has more than 5 frames")
    assert said["smaller"] == ("different_size", "48x32 and 48x16")
    assert said["broken"][0] == "broken_file"
    assert said["broken"][1].startswith("right videos/film.mp4")
    assert said["image"] == ("different_size", "a clip and an image")
    assert said["loud"] == ("different", "the sound differs")
    (difference,) = RunDiff(loud, louder)
    assert difference.message == "the sound differs"
    assert list(RunDiff(loud, loud)) == []


def test_the_worst_come_first_and_fit_in_a_table(tmp_path: Path) -> None:
    rows = [{"seed": seed} for seed in range(4)]
    changed = [dict(row) for row in rows]
    for seed, by in ((1, 4), (2, 120), (3, 30)):
        pixels = random_pixels(seed)
        pixels[0, 0, 0] = 100
        rows[seed]["pixels"] = pixels
        changed[seed]["pixels"] = nudged(pixels, by)
    left = write_run(tmp_path / "left", [*rows, {"seed": 9}, {"seed": 10, "error": "x"}])
    right = write_run(tmp_path / "right", [*changed, {"seed": 10}])
    worst = sorted(RunDiff(left, right), key=lambda one: one.rank)
    table = difference_table(worst, ("request_id",))
    assert table["left_row"].to_pylist() == [5, 2, 3, 1, 4]
    assert table["max_abs"].to_pylist() == [None, 120, 30, 4, None]
    assert table["outcome"].to_pylist() == ["one_failed", *["different"] * 3, "only_left"]
    assert table["psnr"].null_count == 2
    assert difference_table([], ("request_id",)).num_rows == 0
