"""Shards and exports in an object store: sent whole, published once, taken up after a crash."""

import hashlib
import io
import tarfile

import pyarrow.parquet as pq
import pytest

from raydiff.config import OutputConfig
from raydiff.errors import DiskError, OutputError
from raydiff.output.export.export import UNFINISHED, export_run
from raydiff.output.ledger import read_results
from raydiff.output.media_files import read_media
from raydiff.output.shards.index import read_header
from raydiff.output.shards.writer import TEMPORARY_DIR, ShardPublisher, ShardWriter
from raydiff.output.storage import Storage, open_storage
from raydiff.output.verify import Verification
from tests.output.generated_runs import write_run
from tests.s3_server import FaultyS3

CONFIG = OutputConfig(format="webdataset", shard_rows=4)


@pytest.fixture
def out(s3: FaultyS3) -> Storage:
    return open_storage(s3.new_uri())


@pytest.fixture
def write(out, make, random_pixels):
    """Return a function that writes the images of seeds and returns the results that are out."""

    def write_seeds(writer, seeds):
        results = []
        for seed in seeds:
            request = make.request(seed)
            results += writer.write(request, random_pixels(seed), make.result(request))
        return results

    return write_seeds


def check_results(out: Storage, results) -> None:
    for one in results:
        row = {name: getattr(one, name) for name in ("file_name", "member", "offset", "size_bytes")}
        assert hashlib.sha256(read_media(out, row)).hexdigest() == one.sha256


def test_shards_are_sent_whole_through_faults(s3, out, write):
    s3.faults = ["500", "reset", "503", "reset_after"] * 4
    s3.breaks = lambda method, path: len(s3.requests) % 3 == 0
    writer, publisher = ShardWriter(out.uri, CONFIG), ShardPublisher(out, CONFIG)
    assert publisher.adopt(lambda request_id: False) == {}
    results = publisher.publish(write(writer, range(6)) + writer.flush())
    assert [one.file_name for one in results] == ["shards/000000.tar"] * 4 + [
        "shards/000001.tar"
    ] * 2
    check_results(out, results)
    for number in range(2):
        header = read_header(out.read(f"shards/00000{number}.json"))
        data = out.read(f"shards/00000{number}.tar")
        assert header.sha256 == hashlib.sha256(data).hexdigest()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert len(tar.getnames()) == 3 * header.num_samples
    publisher.finish()
    assert out.list_names(TEMPORARY_DIR) == []
    # A tar is sent in one piece or several, but each part of it once: nothing is read back.
    assert not [path for method, path in s3.requests if method == "GET" and ".tmp/" in path
                and path.endswith(".tar")]  # fmt: skip


def test_what_a_crash_left_is_taken_up(out, write):
    publisher = ShardPublisher(out, CONFIG)
    results = publisher.publish(write(ShardWriter(out, CONFIG), range(8)))
    header = read_header(out.read("shards/000001.json"))
    out.move("shards/000001.tar", header.written_as)
    waiting = write(ShardWriter(out, CONFIG), range(8, 12))
    write(ShardWriter(out, CONFIG), range(12, 14))  # open: lost with its worker
    known = {one.request_id for one in results[:4]}
    again = ShardPublisher(out, CONFIG)
    adopted = again.adopt(known.__contains__)
    assert adopted.keys() == {one.request_id for one in (*results[4:], *waiting)}
    check_results(out, adopted.values())
    numbers = [f"00000{number}" for number in range(3)]
    assert out.list_names("shards") == [
        f"{number}.{ending}" for number in numbers for ending in ("json", "tar")
    ]


def test_a_run_is_read_verified_and_exported_where_it_is(s3, out, tmp_path):
    run = write_run(out.uri, [{"seed": seed} for seed in range(12)], format_="webdataset")
    assert list(Verification(run)) == []
    dest = open_storage(s3.new_uri())
    for to in ("webdataset", "imagefolder", "hf-parquet"):
        local = tmp_path / to
        assert export_run(run, local, to=to).num_samples == {"train": 12}
        remote = dest.folder(to)
        assert export_run(run, remote, to=to).num_samples == {"train": 12}
        names = {file.name for file in remote.list_files()}
        assert names == {
            path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()
        }
        for name in names:
            assert remote.read(name) == (local / name).read_bytes()
    table = pq.read_table(io.BytesIO(dest.read("hf-parquet/data/train-00000.parquet")))
    assert table["sha256"].to_pylist() == read_results(run)["sha256"].to_pylist()
    with pytest.raises(OutputError, match="already"):
        export_run(run, dest.folder("webdataset"), to="webdataset")


def test_an_export_that_was_cut_off_is_begun_anew(s3, out):
    run = write_run(out.uri, [{"seed": seed} for seed in range(3)])
    dest = open_storage(s3.new_uri())
    s3.faults = ["403"]
    s3.breaks = lambda method, path: method == "PUT" and path.endswith(".tar")
    with pytest.raises(DiskError, match="could not be written"):
        export_run(run, dest, to="webdataset")
    assert [file.name for file in dest.list_files()] == [UNFINISHED]
    assert export_run(run, dest, to="webdataset").num_samples == {"train": 3}
    assert UNFINISHED not in [file.name for file in dest.list_files()]
