"""One driver per run in an object store, by claims and heartbeats."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest

from raydiff.errors import DiskError, OutputError
from raydiff.object_storage import ObjectStorage, Patience
from raydiff.output.lease import Lease, list_claims
from raydiff.output.lock import RunLock, lock_holder
from tests.s3_server import FaultyS3

HOLD = """
import sys, time
from raydiff.output.lease import Lease
from raydiff.output.storage import open_storage
lease = Lease(open_storage(sys.argv[1]), heartbeat_s=0.3, stale_s=float(sys.argv[2]))
lease.acquire(0)
print(lease.epoch, flush=True)
input()
try:
    lease.check()
    print("held", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""
ELSEWHERE = {"host": "elsewhere", "pid": 4, "started_at": 1.7e9, "is_released": False}


@pytest.fixture(params=["conditional", "unconditional"])
def store(request: pytest.FixtureRequest, s3: FaultyS3) -> ObjectStorage:
    """A store that honours conditional writes, and one that ignores them."""
    s3.ignores_conditions = request.param == "unconditional"
    return ObjectStorage(s3.new_uri())


def take(store: ObjectStorage, *, heartbeat_s: float = 0.2, stale_s: float = 60.0) -> Lease:
    lease = Lease(store, heartbeat_s=heartbeat_s, stale_s=stale_s)
    lease.acquire(0)
    return lease


def start_holder(store: ObjectStorage, stale_s: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.uri, str(stale_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "1"
    return process


def claim_of_another_host(store: ObjectStorage, epoch: int) -> None:
    content = json.dumps({**ELSEWHERE, "epoch": epoch})
    store.put(f".lock/epoch-{epoch:06d}.json", content.encode())


def test_epochs_rise_and_old_claims_go(store: ObjectStorage) -> None:
    for epoch in (1, 2, 3):
        lease = take(store)
        assert lease.epoch == epoch
        lease.check()
        lease.release()
    assert [claim.epoch for claim in list_claims(store)] == [3]
    store.delete(file.name for file in store.list_files())
    with RunLock(store) as lock:
        assert lock.epoch == 1


def test_metadata_keeps_the_epochs_rising(store: ObjectStorage) -> None:
    store.put("metadata/part-000041-000003.parquet", b"")
    with RunLock(store) as lock:
        assert lock.epoch == 42
        holder = lock_holder(store)
        assert holder is not None
        assert (holder.epoch, holder.pid, holder.host) == (42, os.getpid(), platform.node())
    assert lock_holder(store) is None


def test_a_living_driver_is_not_disturbed(store: ObjectStorage) -> None:
    lease = take(store)
    started = time.monotonic()
    with pytest.raises(OutputError, match=f"another driver.*process {os.getpid()} on "):
        take(store)
    assert time.monotonic() - started < 30
    lease.check()
    lease.release()


def test_a_dead_process_of_this_host_is_followed_at_once(s3: FaultyS3) -> None:
    store = ObjectStorage(s3.new_uri())
    with start_holder(store, 60.0) as process:
        process.kill()
    assert lock_holder(store) is None
    started = time.monotonic()
    lease = take(store)
    assert time.monotonic() - started < 20
    assert lease.epoch == 2
    lease.release()


def test_a_silent_driver_of_another_host_is_followed_when_stale(s3: FaultyS3) -> None:
    store = ObjectStorage(s3.new_uri())
    claim_of_another_host(store, 6)
    holder = lock_holder(store)
    assert holder is not None
    assert holder.host == "elsewhere"
    started = time.monotonic()
    lease = take(store, stale_s=2.0)
    assert time.monotonic() - started > 0.9  # Times in the store are whole seconds.
    assert lease.epoch == 7
    lease.release()


def test_a_driver_that_was_stopped_too_long_cannot_commit(store: ObjectStorage) -> None:
    """The first one is stopped past its heartbeat, the second takes over, the first wakes."""
    with start_holder(store, 2.0) as process:
        process.send_signal(signal.SIGSTOP)
        lease = take(store, stale_s=2.0)
        assert lease.epoch == 2
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate("\n", timeout=60)
    assert said.startswith("EngineError")
    assert "epoch 1) no longer holds the folder: it is now process" in said
    assert str(os.getpid()) in said
    lease.check()  # The one that woke up took nothing from the second.
    lease.release()


def test_of_many_that_start_at_once_one_gets_the_run(store: ObjectStorage) -> None:
    got: list[Lease] = []
    refused: list[OutputError] = []

    def start() -> None:
        try:
            got.append(take(ObjectStorage(store.uri)))
        except OutputError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)
    got[0].check()
    got[0].release()


def test_only_a_store_that_ignores_conditions_is_warned_of(s3: FaultyS3) -> None:
    warnings = []
    for s3.ignores_conditions in (False, True):
        with RunLock(s3.new_uri()) as lock:
            warnings.append(lock.warning)
    assert warnings[0] is None
    assert "does not honour conditional writes" in str(warnings[1])


def test_a_store_that_cannot_be_asked_is_an_error_and_no_commit(s3: FaultyS3) -> None:
    patience = Patience(request_s=1.0, first_s=0.3, total_s=0.5)
    store = ObjectStorage(s3.new_uri(), patience=patience)
    lease = take(store)
    s3.outage_until = time.monotonic() + 1e6
    with pytest.raises(DiskError, match="the same command then continues the run"):
        lease.check()
    s3.reset()
    lease.check()  # Nobody took it in the meantime.
    lease.release()


def test_a_bucket_that_is_missing_is_named(s3: FaultyS3) -> None:
    with pytest.raises(
        OutputError, match=r"s3://none/run/metadata: .*NoSuchBucket.*Make the bucket"
    ):
        RunLock("s3://none/run").acquire()
