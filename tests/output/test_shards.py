"""Shards appear whole, in order and without gaps; what a crash left of one is kept."""

import hashlib
import json
import multiprocessing
import os
import signal
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from raydiff.config import OutputConfig
from raydiff.errors import DiskError, EngineError, OutputError
from raydiff.output.media import read_image_metadata
from raydiff.output.shards.index import DamagedIndexError, read_header, read_index
from raydiff.output.shards.writer import TEMPORARY_DIR, ShardPublisher, ShardWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    # The webdataset library leaves the files that it reads to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = OutputConfig(format="webdataset", shard_rows=4)


@pytest.fixture
def write(tmp_path, make, random_pixels):
    """Return a function that writes the images of seeds and returns the results that are out."""

    def write_seeds(writer, seeds):
        out = []
        for seed in seeds:
            request = make.request(seed)
            out += writer.write(request, random_pixels(seed), make.result(request))
        return out

    return write_seeds


@pytest.fixture
def publish(tmp_path, write):
    """Return a function that writes and publishes the images of seeds with one new writer."""

    def publish_seeds(publisher, seeds, config=CONFIG):
        writer = ShardWriter(tmp_path, config)
        return publisher.publish(write(writer, seeds) + writer.flush())

    return publish_seeds


def ids(make, seeds):
    return {make.request(seed).request_id for seed in seeds}


def knows_nothing(request_id):
    return False


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "shards").iterdir() if path.is_file())


def temporaries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / TEMPORARY_DIR).iterdir())


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def check_results(folder: Path, results) -> None:
    """The results say where each image lies, and what it is."""
    for one in results:
        with (folder / one.file_name).open("rb") as file:
            file.seek(one.offset)
            data = file.read(one.size_bytes)
        assert hashlib.sha256(data).hexdigest() == one.sha256
        with tarfile.open(folder / one.file_name) as tar:
            assert tar.extractfile(one.member).read() == data


def test_a_shard_is_what_webdataset_reads(tmp_path, make, write):
    writer, publisher = ShardWriter(tmp_path, CONFIG), ShardPublisher(tmp_path, CONFIG)
    assert write(writer, range(3)) == []
    results = publisher.publish(write(writer, [3]))
    assert [one.request_id for one in results] == [
        make.request(seed).request_id for seed in range(4)
    ]
    assert {one.file_name for one in results} == {"shards/000000.tar"}
    assert all(one.member == f"{one.request_id}.png" and one.write_s > 0 for one in results)
    check_results(tmp_path, results)

    url = str(tmp_path / "shards" / "000000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 4
    for seed, sample in enumerate(samples):
        request = make.request(seed)
        assert sample["__key__"] == request.request_id
        assert sample["png"].shape == (16, 24, 3)
        assert sample["txt"] == request.prompt
        assert sample["json"]["seed"] == seed
        assert sample["json"]["sha256"] == results[seed].sha256
        assert sample["json"]["profile"] == "cpu_only"


def test_equal_samples_are_equal_bytes(tmp_path, write, publish):
    publisher = ShardPublisher(tmp_path, CONFIG)
    publish(publisher, range(4))
    time.sleep(1.1)  # a time stamp would differ
    publish(publisher, range(4))
    first, second = ((tmp_path / f"shards/00000{n}.tar").read_bytes() for n in (0, 1))
    assert first == second
    with tarfile.open(tmp_path / "shards/000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)


def test_shards_have_their_number_of_samples_but_for_the_last(tmp_path, make, write):
    writer, publisher = ShardWriter(tmp_path, CONFIG), ShardPublisher(tmp_path, CONFIG)
    results = publisher.publish(write(writer, range(10)))
    assert Counter(one.file_name for one in results) == {
        "shards/000000.tar": 4,
        "shards/000001.tar": 4,
    }
    rest = publisher.publish(writer.flush())
    assert [one.file_name for one in rest] == ["shards/000002.tar"] * 2
    assert writer.flush() == []
    publisher.finish()
    wids = json.loads((tmp_path / "shards/index.json").read_text())
    assert wids["wids_version"] == 1
    assert [(one["url"], one["nsamples"]) for one in wids["shardlist"]] == [
        ("000000.tar", 4),
        ("000001.tar", 4),
        ("000002.tar", 2),
    ]
    for one in wids["shardlist"]:
        assert one["filesize"] == (tmp_path / "shards" / one["url"]).stat().st_size
    assert temporaries(tmp_path) == []


def test_an_index_says_what_is_in_its_shard(tmp_path, publish):
    publisher = ShardPublisher(tmp_path, CONFIG)
    results = publish(publisher, range(3))
    data = (tmp_path / "shards/000000.json").read_bytes()
    tar = (tmp_path / "shards/000000.tar").read_bytes()
    header = read_header(data[:4096])
    assert (header.num_samples, header.size_bytes) == (3, len(tar))
    assert header.sha256 == hashlib.sha256(tar).hexdigest()
    assert (header.first, header.last) == (results[0].request_id, results[2].request_id)
    assert read_index(data, 0) == results
    assert json.loads(data)["samples"][1]["member"] == results[1].member


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"version": 2}\n', b'{"version": 1}\n'])
def test_what_is_no_index_is_refused(data):
    with pytest.raises(DamagedIndexError):
        read_index(data, 0)


def test_threads_share_a_shard(tmp_path, make, random_pixels):
    config = OutputConfig(format="webdataset", shard_rows=7)
    writer, publisher = ShardWriter(tmp_path, config), ShardPublisher(tmp_path, config)

    def write_one(seed):
        request = make.request(seed)
        return writer.write(request, random_pixels(seed), make.result(request))

    with ThreadPoolExecutor(6) as pool:
        results = [one for rows in pool.map(write_one, range(60)) for one in rows]
    results = publisher.publish(results + writer.flush())
    assert {one.request_id for one in results} == ids(make, range(60))
    assert len(results) == 60
    assert set(Counter(one.file_name for one in results).values()) == {7, 4}
    check_results(tmp_path, results)


def test_an_image_stands_in_a_shard_once(tmp_path, make, write):
    writer = ShardWriter(tmp_path, CONFIG)
    write(writer, [1, 1, 2, 1])
    results = ShardPublisher(tmp_path, CONFIG).publish(writer.flush())
    assert {one.request_id for one in results} == ids(make, [1, 2])
    assert len(members(tmp_path / "shards/000000.tar")) == 6


def test_stripped_shards_have_images_alone(tmp_path, publish):
    config = OutputConfig(format="webdataset", shard_rows=4, strip_metadata=True, image="webp")
    results = publish(ShardPublisher(tmp_path, config), range(2), config)
    check_results(tmp_path, results)
    assert members(tmp_path / "shards/000000.tar") == [f"{one.request_id}.webp" for one in results]
    with tarfile.open(tmp_path / "shards/000000.tar") as tar:
        tar.extract(results[0].member, tmp_path, filter="data")
    assert read_image_metadata(tmp_path / results[0].member) is None


def test_nothing_of_a_row_but_its_hash_names_a_member(tmp_path, make, random_pixels):
    writer = ShardWriter(tmp_path, CONFIG)
    for request_id in ("", "../../x", "AB" * 16, "ab" * 16 + "\n"):
        request = replace(make.request(1), request_id=request_id)
        with pytest.raises(OutputError, match="32 hex digits"):
            writer.write(request, random_pixels(1), make.result(make.request(1)))
    assert writer.flush() == []


def test_hard_prompts_come_back(tmp_path, make, random_pixels):
    prompts = ["", "a\nb\0c", "x" * 100_000, "not \udc80 utf-8", '"quoted", {json}']
    writer, publisher = ShardWriter(tmp_path, CONFIG), ShardPublisher(tmp_path, CONFIG)
    results = []
    for seed, prompt in enumerate(prompts):
        request = make.request(seed, prompt=prompt)
        results += writer.write(request, random_pixels(seed), make.result(request))
    publisher.publish(results + writer.flush())
    urls = [str(tmp_path / "shards" / f"00000{number}.tar") for number in (0, 1)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    texts = [sample["txt"].decode() for sample in samples]
    assert texts == [prompt.replace("\udc80", "\\udc80") for prompt in prompts]
    told = [json.loads(sample["json"])["prompt"] for sample in samples]
    assert told == prompts


# -- what a crash leaves ---------------------------------------------------------------------------


def test_rows_of_a_shard_that_were_not_committed_are_adopted(tmp_path, make, publish):
    committed = publish(ShardPublisher(tmp_path, CONFIG), range(8))
    known = {one.request_id for one in committed[:4]}
    again = ShardPublisher(tmp_path, CONFIG)
    adopted = again.adopt(lambda one: one in known)
    assert adopted == {one.request_id: one for one in committed[4:]}
    more = publish(again, range(8, 10))
    assert {one.file_name for one in more} == {"shards/000002.tar"}
    assert [members(tmp_path / f"shards/00000{n}.tar")[0] for n in range(3)] == [
        one.member for one in (committed[0], committed[4], more[0])
    ]


def test_a_crash_between_index_and_tar_is_put_right(tmp_path, publish):
    results = publish(ShardPublisher(tmp_path, CONFIG), range(8))
    header = read_header((tmp_path / "shards/000001.json").read_bytes())
    (tmp_path / "shards/000001.tar").rename(tmp_path / header.written_as)
    adopted = ShardPublisher(tmp_path, CONFIG).adopt(knows_nothing)
    assert adopted == {one.request_id: one for one in results}
    assert shards(tmp_path) == ["000000.json", "000000.tar", "000001.json", "000001.tar"]
    check_results(tmp_path, adopted.values())


def test_an_index_without_its_tar_gives_its_number_back(tmp_path, publish):
    publish(ShardPublisher(tmp_path, CONFIG), range(8))
    (tmp_path / "shards/000001.tar").unlink()
    publisher = ShardPublisher(tmp_path, CONFIG)
    assert len(publisher.adopt(knows_nothing)) == 4
    assert {one.file_name for one in publish(publisher, range(20, 24))} == {"shards/000001.tar"}


def test_the_number_of_a_lost_shard_that_rows_name_is_not_used_again(tmp_path, publish):
    known = {one.request_id for one in publish(ShardPublisher(tmp_path, CONFIG), range(8))}
    (tmp_path / "shards/000001.tar").unlink()
    publisher = ShardPublisher(tmp_path, CONFIG)
    assert publisher.adopt(known.__contains__) == {}
    assert {one.file_name for one in publish(publisher, range(20, 24))} == {"shards/000002.tar"}


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_an_index_is_made_anew_from_its_tar(damage, tmp_path, publish):
    results = publish(ShardPublisher(tmp_path, CONFIG), range(4))
    index = tmp_path / "shards/000000.json"
    before = read_header(index.read_bytes())
    if damage == "missing":
        index.unlink()
    else:
        index.write_bytes(index.read_bytes()[: 200 if damage == "cut" else 0])
    adopted = ShardPublisher(tmp_path, CONFIG).adopt(knows_nothing)
    after = read_header(index.read_bytes())
    assert (after.sha256, after.size_bytes, after.num_samples) == (
        before.sha256,
        before.size_bytes,
        4,
    )
    names = ("request_id", "file_name", "member", "offset", "sha256", "size_bytes", "profile")
    assert [[getattr(one, name) for name in names] for one in adopted.values()] == [
        [getattr(one, name) for name in names] for one in results
    ]


def test_a_closed_shard_that_was_not_published_is_adopted(tmp_path, make, write):
    writer = ShardWriter(tmp_path, CONFIG)
    write(writer, range(6))
    writer.flush()
    publisher = ShardPublisher(tmp_path, CONFIG)
    known = ids(make, [1])
    adopted = publisher.adopt(known.__contains__)
    assert adopted.keys() == ids(make, [0, 2, 3, 4, 5])
    check_results(tmp_path, adopted.values())
    assert shards(tmp_path) == ["000000.json", "000000.tar", "000001.json", "000001.tar"]
    assert temporaries(tmp_path) == []


def test_what_all_rows_know_is_not_published_again(tmp_path, make, write):
    writer = ShardWriter(tmp_path, CONFIG)
    write(writer, range(6))
    assert ShardPublisher(tmp_path, CONFIG).adopt(ids(make, range(6)).__contains__) == {}
    assert shards(tmp_path) == []
    assert temporaries(tmp_path) == []


def write_for_ever(out_dir, make_request, make_result, pixels):
    writer = ShardWriter(out_dir, OutputConfig(format="webdataset", shard_rows=50))
    for seed in range(100_000):
        request = make_request(seed)
        writer.write(request, pixels[seed % len(pixels)], make_result(request))


def test_the_samples_of_a_killed_worker_are_kept(tmp_path, make, random_pixels):
    """SIGKILL in the middle of writing, several times: each whole sample is adopted, no other."""
    pixels = [random_pixels(seed) for seed in range(10)]
    known: dict = {}
    for delay_s in (0.1, 0.15, 0.2):
        context = multiprocessing.get_context("fork")
        process = context.Process(
            target=write_for_ever, args=(tmp_path, make.request, make.result, pixels)
        )
        process.start()
        while not list((tmp_path / TEMPORARY_DIR).glob("*.tar")):
            time.sleep(0.01)
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        adopted = ShardPublisher(tmp_path, CONFIG).adopt(known.__contains__)
        check_results(tmp_path, adopted.values())
        assert not adopted.keys() & known.keys()
        known |= adopted
        seeds = {make.request(seed).request_id: seed for seed in range(len(known))}
        assert known.keys() == seeds.keys()
        for one in known.values():
            assert one.sha256 == known[one.request_id].sha256


@pytest.mark.parametrize("cut", [100, 600, 3000])
def test_a_cut_sample_is_no_sample(cut, tmp_path, make, write):
    write(ShardWriter(tmp_path, CONFIG), range(3))
    (tar,) = (tmp_path / TEMPORARY_DIR).iterdir()
    size = tar.stat().st_size
    os.truncate(tar, size - cut)
    adopted = ShardPublisher(tmp_path, CONFIG).adopt(knows_nothing)
    assert adopted.keys() == ids(make, range(2))


def test_a_changed_image_is_no_sample(tmp_path, make, write):
    write(ShardWriter(tmp_path, CONFIG), range(3))
    (tar,) = (tmp_path / TEMPORARY_DIR).iterdir()
    with tar.open("r+b") as file:
        file.seek(512 + 100)
        file.write(b"\xff" * 8)
    adopted = ShardPublisher(tmp_path, CONFIG).adopt(knows_nothing)
    assert adopted.keys() == ids(make, [1, 2])


def test_a_published_shard_is_never_written_over(tmp_path, publish):
    """Two drivers that do not know of one another: each shard gets a number of its own."""
    one, other = ShardPublisher(tmp_path, CONFIG), ShardPublisher(tmp_path, CONFIG)
    first = publish(one, range(4))
    second = publish(other, range(4, 8))
    third = publish(one, range(8, 12))
    assert [rows[0].file_name for rows in (first, second, third)] == [
        "shards/000000.tar",
        "shards/000001.tar",
        "shards/000002.tar",
    ]
    check_results(tmp_path, first + second + third)


def test_a_driver_that_was_taken_over_publishes_nothing(tmp_path, write):
    old, writer = ShardPublisher(tmp_path, CONFIG), ShardWriter(tmp_path, CONFIG)
    results = write(writer, range(4))
    adopted = ShardPublisher(tmp_path, CONFIG).adopt(knows_nothing)
    assert len(adopted) == 4
    with pytest.raises(EngineError, match=r"-1\.tar: the shard is gone"):
        old.publish(results)
    check_results(tmp_path, adopted.values())


def test_a_driver_without_the_lock_publishes_nothing(tmp_path, begin, write):
    run = begin()
    writer = ShardWriter(run.out_dir, CONFIG)
    results = write(writer, range(4))
    publisher = ShardPublisher(run.out_dir, CONFIG, fence=run.lock.check)
    (run.out_dir / ".lock").write_text("{}")
    with pytest.raises(EngineError, match="no longer holds the folder"):
        publisher.publish(results)
    assert shards(run.out_dir) == []


def test_publishing_goes_on_after_a_disk_error(tmp_path, write):
    publisher, writer = ShardPublisher(tmp_path, CONFIG), ShardWriter(tmp_path, CONFIG)
    results = write(writer, range(8))
    in_the_way = tmp_path / "shards/000001.tar"
    in_the_way.mkdir()
    with pytest.raises(DiskError, match="could not be written"):
        publisher.publish(results)
    in_the_way.rmdir()
    published = publisher.publish(results)
    assert published == publisher.publish(results)
    assert [one.file_name for one in published] == ["shards/000000.tar"] * 4 + [
        "shards/000001.tar"
    ] * 4
    assert shards(tmp_path) == ["000000.json", "000000.tar", "000001.json", "000001.tar"]
    check_results(tmp_path, published)


def test_failed_rows_pass_through(tmp_path, make, write):
    failed = make.result(make.request(9), status="failed", error="x", file_name=None)
    writer = ShardWriter(tmp_path, CONFIG)
    published = ShardPublisher(tmp_path, CONFIG).publish([failed, *write(writer, range(4))])
    assert published[0] == failed
    assert len(published) == 5


def test_a_full_disk_costs_no_row_that_was_written(full_disk, make, write):
    """The image that does not fit is refused; those before it are published when there is room."""
    config = OutputConfig(format="webdataset", shard_rows=1000)
    writer = ShardWriter(full_disk, config)
    blocker = full_disk / "blocker"
    blocker.write_bytes(bytes(16_000))
    with pytest.raises(DiskError, match=r"No space left.*ENOSPC.*Free space"):
        write(writer, range(200))
    with pytest.raises(DiskError, match="ENOSPC"):
        writer.flush()
    blocker.unlink()
    results = ShardPublisher(full_disk, config).publish(writer.flush())
    assert len(results) > 5
    assert {one.request_id for one in results} == ids(make, range(len(results)))
    check_results(full_disk, results)


def test_the_output_folder_itself_is_never_made_again(tmp_path, write):
    with pytest.raises(DiskError, match="ENOENT"):
        write(ShardWriter(tmp_path / "gone", CONFIG), [1])
    assert not (tmp_path / "gone").exists()


# -- dead workers ----------------------------------------------------------------------------------


def test_what_a_dead_worker_held_is_rescued(tmp_path, make, write):
    """A shard that it closed without saying so, and an open one; other workers' shards stay."""
    dead = ShardWriter(tmp_path, CONFIG, worker_id="w1")
    unheard = write(dead, range(6))
    other = ShardWriter(tmp_path, CONFIG, worker_id="w11")
    write(other, range(6, 8))
    publisher = ShardPublisher(tmp_path, CONFIG)
    rescued = publisher.rescue("w1", ids(make, [2]).__contains__)
    assert {one.request_id for one in rescued} == ids(make, [0, 1, 3, 4, 5])
    assert {one.worker_id for one in rescued} == {"w1"}
    check_results(tmp_path, rescued)
    assert publisher.publish(unheard) == unheard  # Its reply comes late: nothing is done.
    assert publisher.rescue("w1", knows_nothing) == []
    rest = publisher.publish(other.flush())
    check_results(tmp_path, rest)
    assert shards(tmp_path)[1::2] == ["000000.tar", "000001.tar", "000002.tar"]


def test_a_rescue_goes_on_after_a_disk_error(tmp_path, make, write):
    write(ShardWriter(tmp_path, CONFIG, worker_id="w1"), range(6))
    publisher = ShardPublisher(tmp_path, CONFIG)
    in_the_way = tmp_path / "shards/000001.tar"
    in_the_way.mkdir()
    with pytest.raises(DiskError, match="could not be written"):
        publisher.rescue("w1", knows_nothing)
    in_the_way.rmdir()
    rescued = publisher.rescue("w1", knows_nothing)
    assert {one.request_id for one in rescued} == ids(make, range(6))
    assert shards(tmp_path) == ["000000.json", "000000.tar", "000001.json", "000001.tar"]
    check_results(tmp_path, rescued)
    assert temporaries(tmp_path) == []
