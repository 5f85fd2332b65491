"""Files appear whole under names that the request alone decides, or not at all."""

import hashlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from raydiff.config import OutputConfig
from raydiff.errors import DiskError
from raydiff.output.media import read_image_metadata
from raydiff.output.media_store import remove_stale_files
from raydiff.output.writer import Writer

TEMPORARY_DIR = "images/.tmp"

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def files_under(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def test_a_file_is_what_the_result_says(tmp_path, make, random_pixels):
    request = make.request(4)
    written = Writer(tmp_path, OutputConfig()).save(request, random_pixels(4))
    data = (tmp_path / written.file_name).read_bytes()
    assert written.file_name == f"images/{request.request_id[:2]}/{request.request_id}.png"
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert written.size_bytes == len(data)
    assert written.write_s > 0
    metadata = read_image_metadata(tmp_path / written.file_name)
    assert metadata["prompt"] == request.prompt
    assert metadata["seed"] == 4
    assert files_under(tmp_path / TEMPORARY_DIR) == []


def test_no_path_of_this_machine_is_embedded(tmp_path, make, random_pixels):
    request = make.request(
        1,
        model="/home/alice/secret/my-model",
        model_revision="local-0123",
        init_image="/home/alice/secret/cat.png",
        init_image_sha256="ab" * 32,
    )
    written = Writer(tmp_path, OutputConfig()).save(request, random_pixels(1))
    metadata = read_image_metadata(tmp_path / written.file_name)
    assert "alice" not in str(metadata)
    assert metadata["model"] == "my-model"
    assert metadata["init_image_sha256"] == "ab" * 32


def test_stripped_files_have_no_request(tmp_path, make, random_pixels):
    config = OutputConfig(strip_metadata=True)
    written = Writer(tmp_path, config).save(make.request(1), random_pixels(1))
    assert read_image_metadata(tmp_path / written.file_name) is None


@pytest.mark.parametrize(
    "request_id", ["", "../../x", "AB" * 16, "ab" * 15, "ab" * 17, "ab" * 16 + "\n"]
)
def test_only_a_hash_can_name_a_file(request_id, tmp_path, make, random_pixels):
    request = replace(make.request(1), request_id=request_id)
    with pytest.raises(DiskError, match="32 hex digits"):
        Writer(tmp_path, OutputConfig()).save(request, random_pixels(1))
    assert files_under(tmp_path) == []


def test_threads_may_write_the_same_image(tmp_path, make, random_pixels):
    writer = Writer(tmp_path, OutputConfig())
    with ThreadPoolExecutor(6) as pool:
        seeds = list(range(10)) * 6
        results = list(pool.map(lambda n: writer.save(make.request(n), random_pixels(n)), seeds))
    assert len({(one.file_name, one.sha256) for one in results}) == 10
    for one in results:
        assert hashlib.sha256((tmp_path / one.file_name).read_bytes()).hexdigest() == one.sha256
    assert len(files_under(tmp_path)) == 10


def write_many(out_dir, requests, pixels):
    writer = Writer(out_dir, OutputConfig())
    for request, image in zip(requests, pixels, strict=True):
        writer.save(request, image)


def test_processes_may_write_the_same_image(tmp_path, make, random_pixels):
    work = ([make.request(seed) for seed in range(20)], [random_pixels(seed) for seed in range(20)])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(tmp_path, *work)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(files_under(tmp_path)) == 20


def test_folders_removed_in_the_middle_of_a_run_are_made_again(tmp_path, make, random_pixels):
    writer = Writer(tmp_path, OutputConfig())
    first = writer.save(make.request(1), random_pixels(1))
    (tmp_path / first.file_name).unlink()
    (tmp_path / first.file_name).parent.rmdir()
    (tmp_path / TEMPORARY_DIR).rmdir()
    assert writer.save(make.request(1), random_pixels(1)).sha256 == first.sha256


def test_the_output_folder_itself_is_never_made_again(tmp_path, make, random_pixels):
    with pytest.raises(DiskError, match="ENOENT"):
        Writer(tmp_path / "gone", OutputConfig()).save(make.request(1), random_pixels(1))
    assert not (tmp_path / "gone").exists()


def test_a_full_disk_is_named_and_leaves_no_part_of_a_file(tmp_path, make, random_pixels):
    """A process whose files may have 500 bytes; the image has over 1,000."""
    script = (
        "import sys, resource, pickle; from raydiff.output.writer import Writer;"
        "from raydiff.config import OutputConfig; from raydiff.errors import DiskError\n"
        "request, pixels = pickle.load(sys.stdin.buffer)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "try: Writer(sys.argv[1], OutputConfig()).save(request, pixels)\n"
        "except DiskError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        input=pickle.dumps((make.request(1), random_pixels(1))),
        capture_output=True,
        check=True,
    )
    message = done.stdout.decode()
    assert re.search(r"images/../[0-9a-f]{32}\.png: could not be written: .*EFBIG.*Raise", message)
    assert files_under(tmp_path) == []


def test_a_full_disk_says_how_to_go_on(full_disk, make, random_pixels):
    pixels = [random_pixels(seed) for seed in range(200)]
    with pytest.raises(DiskError, match=r"No space left.*ENOSPC.*Free space.*same") as caught:
        write_many(full_disk, [make.request(seed) for seed in range(200)], pixels)
    assert str(full_disk) in str(caught.value)
    for name in files_under(full_disk):
        assert read_image_metadata(full_disk / name) is not None
    assert files_under(full_disk / TEMPORARY_DIR) == []


def test_a_read_only_disk_is_named(read_only_folder, make, random_pixels):
    writer = Writer(read_only_folder, OutputConfig())
    with pytest.raises(DiskError, match=r"Read-only file system \(EROFS\). Mount that disk"):
        writer.save(make.request(1), random_pixels(1))


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path, make, random_pixels):
    (tmp_path / "images").write_text("not a folder")
    with pytest.raises(DiskError, match="images"):
        Writer(tmp_path, OutputConfig()).save(make.request(1), random_pixels(1))


def test_only_stale_files_of_ours_are_removed(tmp_path, make, random_pixels):
    """A killed process leaves its file; a live one's, a foreign one and another host's stay."""
    Writer(tmp_path, OutputConfig()).save(make.request(1), random_pixels(1))
    folder = tmp_path / TEMPORARY_DIR
    host = re.sub(r"[^\w-]", "-", os.uname().nodename)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = folder / f"{'ab' * 16}.{host}.{child.pid}.01234567-0.tmp"
    live = folder / f"{'ab' * 16}.{host}.{os.getpid()}.01234567-1.tmp"
    elsewhere = folder / f"{'ab' * 16}.another-host.1.01234567-2.tmp"
    elsewhere_old = folder / f"{'ab' * 16}.another-host.1.01234567-3.tmp"
    foreign = folder / "notes.tmp"
    for path in (dead, live, elsewhere, elsewhere_old, foreign):
        path.write_bytes(b"half")
    long_ago = time.time() - 7200
    for path in (elsewhere_old, foreign):
        os.utime(path, (long_ago, long_ago))
    assert remove_stale_files(tmp_path) == 2
    assert {path.name for path in folder.iterdir()} == {live.name, elsewhere.name, foreign.name}


def test_a_writer_killed_at_any_moment_leaves_whole_files_only(tmp_path, make, random_pixels):
    """SIGKILL in the middle of writing, several times; no file under its name is cut."""
    requests = [make.request(seed) for seed in range(400)]
    pixels = [random_pixels(seed) for seed in range(400)]
    for delay_s in (0.02, 0.05, 0.09):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=write_many, args=(tmp_path, requests, pixels))
        process.start()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for path in (tmp_path / "images").glob("[!.]*/*"):
            assert read_image_metadata(path) is not None
        remove_stale_files(tmp_path)
        assert files_under(tmp_path / TEMPORARY_DIR) == []
