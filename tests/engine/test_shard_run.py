"""A run in shards through the whole engine: killed, continued, each good row in one shard once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from raydiff.engine.render import RunSummary
from raydiff.output.ledger import read_results
from raydiff.output.shards.index import read_header
from raydiff.output.verify import Verification
from tests.engine.waiting import wait_for_rows

WritePrompts = Callable[[Sequence[str | None]], Path]
Drive = Callable[..., RunSummary]

OUTPUT = {"format": "webdataset", "shard_rows": 20}


def start(manifest: Path, out: Path, log: Path) -> "subprocess.Popen[bytes]":
    program = Path(__file__).with_name("drive.py")
    arguments = [str(one) for one in (manifest, out, log, 10, json.dumps(OUTPUT))]
    return subprocess.Popen([sys.executable, str(program), *arguments], start_new_session=True)


def published(out: Path) -> dict[str, str]:
    """The sha256 of each numbered shard."""
    paths = sorted((out / "shards").glob("*.tar"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def keys(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        names = [name.partition(".") for name in tar.getnames()]
    assert [name[2] for name in names] == ["png", "json", "txt"] * (len(names) // 3)
    return [name[0] for name in names[::3]]


def rendered(log: Path) -> list[str]:
    """The request_id of each row that was rendered, in their order."""
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_a_run_in_shards_is_killed_and_continued(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive
) -> None:
    prompts: list[str | None] = [f"prompt {number}" for number in range(300)]
    prompts[10] = None
    prompts[20] = "please raise"
    prompts[150] = "please crash"
    prompts[100] = prompts[101] = prompts[299] = "the same"
    manifest, out, log = write_prompts(prompts), tmp_path / "out", tmp_path / "renders.log"

    driver = start(manifest, out, log)
    wait_for_rows(driver, out, 60, every_s=0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(30)
    before = published(out)
    committed = set(read_results(out)["request_id"].to_pylist())
    first = rendered(log)

    summary = drive(manifest, out, log, output=OUTPUT)
    assert (summary.completed, summary.failed, summary.quarantined) == (297, 2, 1)
    results = read_results(out)
    assert results["row_index"].to_pylist() == list(range(300))
    assert list(Verification(out)) == []

    shards = published(out)
    assert list(shards) == [f"{number:06d}.tar" for number in range(len(shards))]
    assert before.items() <= shards.items()
    for name, digest in shards.items():
        header = read_header((out / "shards" / name).with_suffix(".json").read_bytes())
        assert header.sha256 == digest
        assert header.num_samples == len(keys(out / "shards" / name)) <= 20
    listed = json.loads((out / "shards" / "index.json").read_text())["shardlist"]
    assert [one["url"] for one in listed] == list(shards)
    assert list((out / "shards" / ".tmp").iterdir()) == []

    completed = {row["request_id"] for row in results.to_pylist() if row["status"] == "completed"}
    samples = Counter(key for name in shards for key in keys(out / "shards" / name))
    assert samples == dict.fromkeys(completed, 1)
    # What lay in the killed workers' open shards was kept; each had two batches of 4 under way.
    again = rendered(log)[len(first) :]
    assert not set(again) & committed
    assert len(set(again) & set(first)) <= 2 * 8
    # The row that kills its worker, three times, takes two batches along, and no shard.
    assert len(again) <= len(completed - set(first)) + 2 * 8 + 3 * 8

    assert drive(manifest, out, log, output=OUTPUT).ended == 0
    assert published(out) == shards
