"""A local folder and an object store behave alike."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.errors import ConfigError
from raydiff.object_storage import is_object_uri, is_uri, split_uri
from raydiff.output import storage as storage_module
from raydiff.output.storage import LocalStorage, Storage, open_storage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path)
    return open_storage(request.getfixturevalue("s3").new_uri())


def names(storage: Storage, folder: str = "") -> list[str]:
    return [file.name for file in storage.list_files(folder)]


def test_what_is_put_is_read(storage: Storage) -> None:
    data = bytes(range(256)) * 4
    storage.put("a/b/c d.bin", data)
    storage.put("a/b/c d.bin", data[1:])
    storage.put("top", b"", is_durable=False)
    assert storage.read("a/b/c d.bin") == data[1:]
    assert storage.read_range("a/b/c d.bin", 1020, 100) == data[1021:]
    assert (storage.size("a/b/c d.bin"), storage.size("top"), storage.size("a")) == (1023, 0, None)
    inner = storage.folder("a").folder("b")
    assert inner.read("c d.bin") == data[1:]
    assert inner.describe("c d.bin") == storage.describe("a/b/c d.bin") == f"{inner.uri}/c d.bin"


def test_what_is_not_there_is_not_found(storage: Storage) -> None:
    storage.put("a", b"1")
    for call in (storage.read, storage.open_input, storage.folder("none").read):
        with pytest.raises(FileNotFoundError):
            call("none")
    assert storage.size("none/none") is None
    assert names(storage, "none") == storage.list_names("none") == []
    storage.delete(["none", "a", "none/none"])
    assert names(storage) == []


def test_listings_are_by_name_and_of_one_folder(storage: Storage) -> None:
    for name in ("b/2", "b/1", "b/c/3", "bb/4", "a"):
        storage.put(name, b"x" * int(name[-1], 16))
    assert names(storage) == ["a", "b/1", "b/2", "b/c/3", "bb/4"]
    assert names(storage, "b") == ["b/1", "b/2", "b/c/3"]
    assert names(storage.folder("b")) == ["1", "2", "c/3"]
    assert storage.list_names() == ["a", "b", "bb"]
    assert storage.list_names("b") == ["1", "2", "c"]
    assert [file.size_bytes for file in storage.list_files("b")] == [1, 2, 3]


def test_a_name_is_created_once(storage: Storage) -> None:
    assert storage.create("locks/one", b"first")
    assert not storage.create("locks/one", b"second")
    assert storage.read("locks/one") == b"first"
    assert names(storage) == ["locks/one"]


def test_a_file_is_moved_over_another(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"0123456789" * 2_000_000)
    storage.put("to/b", b"old")
    storage.put_file("a", tmp_path / "big")
    storage.move("a", "to/b")
    assert storage.size("a") is None
    assert storage.size("to/b") == 20_000_000
    assert storage.read_range("to/b", 15_000_003, 4) == b"3456"
    with pytest.raises(FileNotFoundError):
        storage.move("a", "to/b")


def test_parquet_is_read_in_place(storage: Storage, tmp_path: Path) -> None:
    rows = 300_000
    table = pa.table(
        {"a": range(rows), "b": [f"{row * 7919 % 1_000_003:050d}" for row in range(rows)]}
    )
    pq.write_table(table, tmp_path / "t", row_group_size=50_000, compression="none")
    storage.put_file("x/t", tmp_path / "t")
    with storage.open_input("x/t") as source, pq.ParquetFile(source, pre_buffer=True) as file:
        assert source.size() > 8 * 2**20
        assert file.read(columns=["a"]).equals(table.select(["a"]))
        assert file.read_row_group(3).equals(table.slice(150_000, 50_000))


def test_a_fence_is_asked_before_each_write(storage: Storage) -> None:
    def refuse() -> None:
        raise InterruptedError

    storage.put("a", b"1", fence=lambda: None)
    with pytest.raises(InterruptedError):
        storage.put("a", b"2", fence=refuse)
    assert storage.read("a") == b"1"


def test_a_local_folder_is_never_made_itself(tmp_path: Path) -> None:
    gone = LocalStorage(tmp_path / "gone")
    for write in (gone.put, gone.create, gone.folder("a").put):
        with pytest.raises(FileNotFoundError):
            write("a", b"1")
    assert not (tmp_path / "gone").exists()
    assert gone.local_path("a/b") == tmp_path / "gone" / "a" / "b"


def test_a_folder_that_another_thread_has_just_made_is_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_late(path: Path, data: bytes, *, is_durable: bool) -> None:
        try:
            path.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir()  # The other thread is quicker.
            raise

    monkeypatch.setattr(storage_module, "replace_file", write_late)
    LocalStorage(tmp_path).put("a/b", b"1")
    assert (tmp_path / "a" / "b").read_bytes() == b"1"


def test_uris_are_told_from_paths() -> None:
    assert is_object_uri("s3://b/x")
    assert is_uri("hdfs://h/x")
    assert not is_object_uri("hdfs://h/x")
    assert not is_uri("a/b:c")
    assert split_uri("gs://bucket/a//b/") == ("bucket", "a/b")
    assert split_uri("s3://bucket") == ("bucket", "")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://KEY:SECRET@bucket/run", "s3://bucket/run: this URI was given with credentials"),
        ("s3://bucket/run?secret_key=SECRET", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("http://host/run", "not a kind of storage that raydiff opens. Known: s3://, gs://, az://"),
        ("s3:///run", "Write it as s3://BUCKET/PATH"),
        ("gs://bucket/a/../b", "Write it as gs://BUCKET/PATH"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused(uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_storage(uri)
    assert said in str(caught.value)
    assert "SECRET@" not in str(caught.value)
    assert "=SECRET" not in str(caught.value)


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE"):
        open_storage("az://container/run")
