"""One driver per folder, and none that lost it can commit."""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from raydiff.errors import EngineError, OutputError
from raydiff.output.lock import RunLock, lock_holder

HOLD = (
    "import sys, time; from raydiff.output.lock import RunLock\n"
    "lock = RunLock(sys.argv[1]).acquire(); print(lock.epoch, flush=True); time.sleep(60)"
)


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip().isdigit()
    return process


def test_a_second_driver_is_refused_and_told_who_has_the_folder(tmp_path):
    with start_holder(tmp_path) as process:
        holder = lock_holder(tmp_path)
        assert (holder.pid, holder.host, holder.epoch) == (process.pid, platform.node(), 1)
        with pytest.raises(OutputError) as caught:
            RunLock(tmp_path).acquire()
        for word in (str(tmp_path), f"process {process.pid} on {platform.node()}", "since 20"):
            assert word in str(caught.value)
        process.kill()


def test_a_dead_drivers_lock_is_taken_over_at_once(tmp_path):
    with start_holder(tmp_path) as process:
        process.kill()
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path) as lock:
        assert lock.epoch == 2
        lock.check()


def test_the_same_process_is_refused_too(tmp_path):
    with RunLock(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()


def test_epochs_rise_with_each_driver(tmp_path):
    epochs = []
    for _ in range(4):
        with RunLock(tmp_path) as lock:
            epochs.append(lock.epoch)
    assert epochs == [1, 2, 3, 4]
    assert lock_holder(tmp_path) is None


def test_a_removed_lock_file_does_not_restart_the_epochs(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "part-000041-000003.parquet").touch()
    (tmp_path / "metadata" / ".part-000042-000001.parquet.tmp").touch()
    with RunLock(tmp_path) as lock:
        assert lock.epoch == 43


def test_a_torn_lock_file_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_bytes(b'{"epoch": 7, "ho')
    with RunLock(tmp_path) as lock:
        assert lock.epoch == 1
        lock.check()


@pytest.mark.parametrize("how", ["removed", "replaced", "rewritten"])
def test_a_driver_that_lost_the_folder_cannot_commit(how, tmp_path):
    lock = RunLock(tmp_path).acquire()
    lock.check()
    path = tmp_path / ".lock"
    if how == "removed":
        path.unlink()
    elif how == "replaced":
        path.unlink()
        successor = RunLock(tmp_path).acquire()
    else:
        holder = {"epoch": 2, "host": "elsewhere", "pid": 9, "started_at": 1.7e9}
        path.write_text(json.dumps(holder))
    with pytest.raises(EngineError, match="no longer holds the folder"):
        lock.check()
    lock.release()
    if how == "replaced":
        successor.check()
        successor.release()


def test_a_released_lock_cannot_commit(tmp_path):
    lock = RunLock(tmp_path).acquire()
    lock.release()
    with pytest.raises(EngineError):
        lock.check()


def test_someone_who_only_looks_does_not_stop_a_driver(tmp_path):
    RunLock(tmp_path).acquire().release()
    descriptor = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    script = "import sys, time, os; time.sleep(0.2); os.close(0)"
    # The child holds the shared lock for 0.2 s after this process lets go of it.
    with subprocess.Popen([sys.executable, "-c", script], stdin=descriptor):
        os.close(descriptor)
        with RunLock(tmp_path) as lock:
            assert lock.epoch == 2


def test_a_folder_that_cannot_be_written_is_named(read_only_folder):
    with pytest.raises(OutputError, match=r"read-only: not writable: Read-only.*another --out"):
        RunLock(read_only_folder).acquire()


def no_flock(descriptor: int, mode: int) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_without_flock_a_live_driver_of_this_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with RunLock(tmp_path), pytest.raises(OutputError, match="another driver"):
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path) as lock:
        assert lock.epoch == 2


def test_without_flock_another_hosts_driver_is_fenced(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    first = RunLock(tmp_path).acquire()
    holder = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps({**holder, "host": "elsewhere"}))
    with RunLock(tmp_path) as second:
        assert second.epoch == 2
        with pytest.raises(EngineError, match=f"process {os.getpid()} on {platform.node()}"):
            first.check()
