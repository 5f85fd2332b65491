"""An object store that fails: waited out when that helps, told plainly when it does not."""

import time
from collections.abc import Callable

import pytest
from obstore.exceptions import GenericError

from raydiff.object_storage import ObjectStorage, Patience, StorageError
from tests.s3_server import FaultyS3

PATIENCE = Patience(request_s=1.0, first_s=30.0, total_s=30.0)


@pytest.fixture
def storage(s3: FaultyS3) -> ObjectStorage:
    storage = ObjectStorage(s3.new_uri(), patience=PATIENCE)
    storage.put("there", b"x" * 100)
    return storage


OPERATIONS: dict[str, Callable[[ObjectStorage], object]] = {
    "read": lambda one: one.read("there"),
    "read_range": lambda one: one.read_range("there", 10, 5),
    "put": lambda one: one.put("new", b"1" * 1000),
    "create": lambda one: one.create("new", b"2"),
    "list": lambda one: [file.name for file in one.list_files()],
    "names": lambda one: one.list_names(),
    "size": lambda one: one.size("there"),
    "move": lambda one: one.move("there", "moved"),
    "delete": lambda one: one.delete(["there"]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_faults_are_waited_out(operation: str, s3: FaultyS3) -> None:
    results = []
    for faults in ([], ["503", "reset_after"]):
        storage = ObjectStorage(s3.new_uri(), patience=PATIENCE)
        storage.put("there", b"x" * 100)
        s3.faults = list(faults)
        results.append((OPERATIONS[operation](storage), [*storage.list_files()]))
        assert not s3.faults
    (expected, files), (got, files_after_faults) = results
    assert got == expected
    assert [file[:2] for file in files_after_faults] == [file[:2] for file in files]


def test_a_server_that_hangs_is_given_up_and_asked_again(
    storage: ObjectStorage, s3: FaultyS3
) -> None:
    s3.faults = ["hang"]
    started = time.monotonic()
    storage.put("new", b"1")
    assert 0.9 < time.monotonic() - started < 25
    assert storage.read("new") == b"1"


def test_every_kind_of_fault_is_waited_out(storage: ObjectStorage, s3: FaultyS3) -> None:
    s3.faults = ["500", "503", "reset", "reset_after"]
    storage.put("new", b"1")
    assert not s3.faults
    assert storage.read("new") == b"1"


def test_an_outage_is_waited_out(storage: ObjectStorage, s3: FaultyS3) -> None:
    s3.outage_until = time.monotonic() + 1.5
    assert storage.read("there") == b"x" * 100
    assert time.monotonic() > s3.outage_until


def test_a_long_outage_is_an_error_in_bounded_time(s3: FaultyS3) -> None:
    patience = Patience(request_s=1.0, first_s=0.5, total_s=2.0)
    storage = ObjectStorage(s3.new_uri(), patience=patience)
    storage.put("there", b"1")
    s3.outage_until = time.monotonic() + 1e6
    started = time.monotonic()
    with pytest.raises(StorageError, match="Check that the store can be reached") as caught:
        storage.put("there", b"2")
    assert time.monotonic() - started < 20
    assert caught.value.is_outage
    num_requests = len(s3.requests)
    with pytest.raises(StorageError):  # What comes next is told sooner.
        storage.read("there")
    assert len(s3.requests) - num_requests < num_requests
    s3.reset()
    assert storage.read("there") == b"1"


def test_a_wrong_address_is_told_sooner_than_an_outage(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    patience = Patience(request_s=1.0, first_s=0.3, total_s=1e6)
    with pytest.raises(
        StorageError, match=r"s3://bucket/run/a: no answer from http://127.0.0.1:9 .*reached"
    ):
        ObjectStorage("s3://bucket/run", patience=patience).read("a")


def test_a_duration_is_not_taken_for_a_status(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Error performing GET http://127.0.0.1:9/b/a in 403.9µs - HTTP error: not sent"

    def refuse(*_: object) -> None:
        raise GenericError(f"{text}\n\nDebug source:\nGeneric {{ elapsed: 401.5µs }}")

    monkeypatch.setattr("obstore.get", refuse)
    patience = Patience(request_s=1.0, first_s=0.1, total_s=0.1)
    with pytest.raises(StorageError, match="Check that the store can be reached"):
        ObjectStorage(s3.new_uri(), patience=patience).read("credentials/403")


def test_what_waiting_does_not_help_is_told_at_once(s3: FaultyS3) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStorage("s3://no-such-bucket/run").put("a", b"1")
    assert str(caught.value) == (
        "s3://no-such-bucket/run/a: 404 Not Found (NoSuchBucket: The specified bucket does not "
        "exist). Make the bucket, or correct its name (s3://no-such-bucket)."
    )
    assert not caught.value.is_outage
    assert s3.requests.count(("PUT", "/no-such-bucket/run/a")) == 1
    storage = ObjectStorage(s3.new_uri())
    s3.faults = ["403"]
    with pytest.raises(StorageError, match=r"403 Forbidden.*Set AWS_ACCESS_KEY_ID"):
        storage.read("a")
    for name in ("a//b", "../b"):
        with pytest.raises(StorageError, match="parse path"):
            storage.read(name)


def test_a_fence_is_asked_before_each_attempt(storage: ObjectStorage, s3: FaultyS3) -> None:
    s3.faults = ["500", "500"]
    calls = []
    storage.put("new", b"1", fence=lambda: calls.append(len(s3.requests)))
    assert len(calls) == 3
    assert len(set(calls)) == 3


def test_a_listing_goes_on_where_it_broke_off(
    storage: ObjectStorage, s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # of one page
    monkeypatch.setattr("raydiff.object_storage.PAGE_ROWS", 2)
    for index in range(7):
        storage.put(f"many/{index}", b"")
    files = storage.list_files("many")
    first = next(files)
    s3.faults = ["500", "reset"]
    assert [first.name, *(file.name for file in files)] == [f"many/{index}" for index in range(7)]
    assert not s3.faults


def test_marks_of_empty_folders_are_passed_over(storage: ObjectStorage, s3: FaultyS3) -> None:
    path = f"/bucket/{storage.uri.rpartition('/')[2]}"
    for mark in ("/", "/inner/"):
        s3.request("PUT", path + mark)
    storage.put("inner/a", b"1")
    assert [file.name for file in storage.list_files("inner")] == ["inner/a"]
    assert "there" in [file.name for file in storage.list_files()]
    assert storage.list_names() == ["inner", "there"]
    assert storage.list_names("inner") == ["a"]


def test_a_small_object_is_opened_in_two_requests_or_one(
    storage: ObjectStorage, s3: FaultyS3
) -> None:
    s3.requests.clear()
    assert storage.open_input("there").read() == b"x" * 100
    assert [method for method, _ in s3.requests] == ["HEAD", "GET"]
    s3.requests.clear()
    assert storage.open_input("there", 100).read() == b"x" * 100
    assert [method for method, _ in s3.requests] == ["GET"]


def test_a_large_object_is_written_in_several_requests(
    storage: ObjectStorage, s3: FaultyS3, tmp_path
) -> None:
    path = tmp_path / "video"
    path.write_bytes(b"0123456789abcdef" * 2**20)
    s3.requests.clear()
    s3.faults = ["500"]
    storage.put_file("video", path)
    assert sum(method == "PUT" for method, _ in s3.requests) >= 2
    assert storage.size("video") == 2**24
    storage.put("small", b"1" * 2**20)
    assert s3.requests[-1] == ("PUT", f"/bucket/{storage.uri.rpartition('/')[2]}/small")
