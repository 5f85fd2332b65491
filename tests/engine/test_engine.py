"""The engine on a real local Ray: every row once, whatever dies."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from raydiff.engine.render import RunSummary
from raydiff.errors import DiskError, EngineError, OutputError
from raydiff.output.ledger import read_results
from raydiff.output.progress import Progress, read_progress
from raydiff.output.verify import Verification
from tests.engine.waiting import wait_for_rows

WritePrompts = Callable[[Sequence[str | None]], Path]
Drive = Callable[..., RunSummary]


def statuses(out: Path) -> Counter[str]:
    return Counter(read_results(out)["status"].to_pylist())


def rendered(log: Path) -> Counter[str]:
    """How often each request was rendered."""
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def visible_gpus(log: Path) -> set[str]:
    return {line.split("gpus=")[1] for line in log.read_text().splitlines()}


class Chaos:
    """Kills a worker once, and looks at the cluster while it is there."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.killed: int | None = None
        self.addresses: set[str] = set()
        self.warnings: list[str] = []

    def on_progress(self, progress: Progress) -> None:
        workers = [worker["pid"] for worker in progress.workers if worker["state"] == "busy"]
        if self.killed is None and progress.done >= 40 and workers:
            self.addresses = listening_addresses()
            # One that has just died of the poisoned row is no one to kill.
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
                self.killed = workers[0]


def listening_addresses() -> set[str]:
    """Where this process and all below it listen."""
    addresses = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # one that ended just now
            addresses |= {
                connection.laddr.ip
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
    return addresses


def test_bad_poison_and_equal_rows_and_a_killed_worker(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts: list[str | None] = [f"prompt {number}" for number in range(200)]
    prompts[10] = None
    prompts[20] = "please raise"
    prompts[60] = "please crash"
    prompts[100] = prompts[101] = prompts[199] = "the same"
    manifest, out, log = write_prompts(prompts), tmp_path / "out", tmp_path / "renders.log"
    others = set(psutil.Process().children(recursive=True))  # of earlier tests, say their tracker
    chaos = Chaos(log)
    summary = drive(
        manifest,
        out,
        log,
        row_ms=10,
        num_gpus=2,
        on_progress=chaos.on_progress,
        on_warning=chaos.warnings.append,
    )

    assert chaos.killed is not None
    assert (summary.completed, summary.failed, summary.quarantined) == (197, 2, 1)
    assert (summary.ended, summary.duplicates, summary.exit_status) == (200, 2, 1)
    results = read_results(out)
    assert results["row_index"].to_pylist() == list(range(200))
    assert results["tag"].to_pylist() == list(range(200))
    assert "row 10: prompt is null" in results["error"][10].as_py()
    assert results["status"][20].as_py() == "failed"
    assert "cannot render 'please raise'" in results["error"][20].as_py()
    assert results["status"][60].as_py() == "quarantined"
    assert "workers died rendering this row" in results["error"][60].as_py()
    assert "died: Segmentation fault" in results["error"][60].as_py()
    assert not [problem for problem in Verification(out) if problem.is_error]
    # One batch was under way in each dead worker, and one behind it.
    assert sum(rendered(log).values()) <= 195 + 5 * 8
    assert len({results["file_name"][row].as_py() for row in (100, 101, 199)}) == 1
    # One warning for each death, whatever calls the worker had: the one that was killed, and those
    # that the poisoned row took with it (one more where it was first behind another batch). Ray
    # does not always know by then of what a worker died, only that it did.
    deaths = [warning for warning in chaos.warnings if "died" in warning]
    assert 4 <= len(deaths) <= 7
    assert any("Segmentation fault" in death for death in deaths)
    assert read_progress(out).state == "finished"

    # Ray believes in the two GPUs, and gives each worker one.
    assert visible_gpus(log) == {"0", "1"}
    assert chaos.addresses
    assert chaos.addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert capfd.readouterr().out == ""
    assert set(psutil.Process().children(recursive=True)) <= others


def start(manifest: Path, out: Path, log: Path, row_ms: int = 10) -> "subprocess.Popen[bytes]":
    program = Path(__file__).with_name("drive.py")
    arguments = [str(manifest), str(out), str(log), str(row_ms)]
    return subprocess.Popen([sys.executable, str(program), *arguments], start_new_session=True)


def test_an_interrupted_and_a_killed_run_are_continued(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive
) -> None:
    prompts = [f"prompt {number}" for number in range(600)]
    manifest, out, log = write_prompts(prompts), tmp_path / "out", tmp_path / "renders.log"

    driver = start(manifest, out, log)
    wait_for_rows(driver, out, 40, patience_s=60)
    with pytest.raises(OutputError, match="another driver"):
        drive(manifest, out, log)
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(30) == 130
    # What was in flight has ended and is committed: nothing rendered is lost.
    num_interrupted = read_results(out).num_rows
    assert rendered(log) == Counter(read_results(out)["request_id"].to_pylist())
    assert read_progress(out).state == "interrupted"
    assert num_interrupted < 600

    driver = start(manifest, out, log)
    wait_for_rows(driver, out, num_interrupted + 40, patience_s=60)
    family = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in family if process.name().startswith("ray::WorkerActor")]
    assert len(workers) == 2
    driver.kill()
    driver.wait(30)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    committed = set(read_results(out)["request_id"].to_pylist())
    before = rendered(log)
    assert len(committed) < 600

    summary = drive(manifest, out, log)
    assert (summary.completed, summary.exit_status) == (600, 0)
    assert summary.ended == 600 - len(committed)
    assert read_results(out)["row_index"].to_pylist() == list(range(600))
    assert not [problem for problem in Verification(out) if problem.is_error]
    repeated = {request_id for request_id, count in rendered(log).items() if count > 1}
    assert not repeated & committed
    assert len(repeated) <= sum(before.values()) - len(committed)

    # Nothing is left to do, and no Ray is started to find that out.
    started = time.monotonic()
    assert drive(manifest, out, log).ended == 0
    assert time.monotonic() - started < 3


def test_a_second_interrupt_stops_at_once(tmp_path: Path, write_prompts: WritePrompts) -> None:
    manifest = write_prompts([f"prompt {number}" for number in range(600)])
    out, log = tmp_path / "out", tmp_path / "renders.log"
    driver = start(manifest, out, log, row_ms=5000)
    until = time.monotonic() + 60
    status = out / "status.json"
    while not status.exists() or '"busy"' not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGTERM)
    time.sleep(1)
    assert driver.poll() is None
    os.kill(driver.pid, signal.SIGTERM)
    assert driver.wait(15) == 130
    assert read_progress(out).state == "interrupted"


def test_a_renderer_that_cannot_start_ends_the_run(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive
) -> None:
    manifest, out, log = write_prompts(["a"]), tmp_path / "out", tmp_path / "renders.log"
    with pytest.raises(EngineError, match="no worker could start: worker w0: no such device"):
        drive(manifest, out, log, renderer="faulty_renderer:UnstartableRenderer")
    assert read_progress(out).state == "stopped"
    assert read_results(out).num_rows == 0


def test_an_error_of_the_callers_own_leaves_no_file_open(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive
) -> None:
    def fail(progress: Progress) -> None:
        raise KeyError("a caller's own mistake")

    manifest, out, log = write_prompts(["a"]), tmp_path / "out", tmp_path / "renders.log"
    with pytest.raises(KeyError, match="own mistake"):
        drive(manifest, out, log, on_progress=fail)
    assert not [one for one in psutil.Process().open_files() if one.path.startswith(str(out))]


def test_a_disk_that_fails_ends_the_run_and_it_can_be_continued(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive
) -> None:
    prompts = [f"prompt {number}" for number in range(300)]
    manifest, out, log = write_prompts(prompts), tmp_path / "out", tmp_path / "renders.log"

    def break_disk(progress: Progress) -> None:
        if progress.done >= 20 and (out / "images").is_dir():
            (out / "images").rename(out / "images-away")
            (out / "images").touch()

    with pytest.raises(DiskError, match="the same command then continues the run"):
        drive(manifest, out, log, row_ms=10, on_progress=break_disk)
    num_done = read_results(out).num_rows
    assert 20 <= num_done < 300
    assert statuses(out) == {"completed": num_done}
    assert visible_gpus(log) == {""}


def test_an_output_that_cannot_be_written_for_a_while_is_waited_for(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive
) -> None:
    manifest = write_prompts([f"prompt {number}" for number in range(200)])
    out, log = tmp_path / "out", tmp_path / "renders.log"
    warnings: list[str] = []
    broken_at = 0.0

    def break_and_repair(progress: Progress) -> None:
        nonlocal broken_at
        if not broken_at and progress.done >= 20:
            (out / "metadata").rename(tmp_path / "metadata")
            (out / "metadata").touch()
            broken_at = time.monotonic()
        elif (out / "metadata").is_file() and time.monotonic() > broken_at + 2:
            (out / "metadata").unlink()
            (tmp_path / "metadata").rename(out / "metadata")

    summary = drive(
        manifest, out, log, row_ms=5, on_progress=break_and_repair, on_warning=warnings.append
    )
    assert (summary.completed, summary.exit_status) == (200, 0)
    assert sum("could not be written" in warning for warning in warnings) == 1
    assert sum("The output can be written again" in warning for warning in warnings) == 1
    # Nobody rendered a row twice for it.
    assert set(rendered(log).values()) == {1}
    assert not [problem for problem in Verification(out) if problem.is_error]


def test_a_head_that_is_gone_ends_the_run_and_it_can_be_continued(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive
) -> None:
    manifest = write_prompts([f"prompt {number}" for number in range(500)])
    out, log = tmp_path / "out", tmp_path / "renders.log"
    program = Path(__file__).with_name("lose_head.py")
    run = subprocess.run(
        [sys.executable, str(program), str(manifest), str(out), str(log)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 3, run.stderr
    assert "the head of the Ray cluster has not answered for" in run.stdout
    assert read_progress(out).state == "stopped"
    num_done = read_results(out).num_rows
    assert 20 <= num_done < 500
    summary = drive(manifest, out, log)
    assert (summary.completed, summary.ended) == (500, 500 - num_done)


IMPATIENT = """
import sys
from pathlib import Path
from raydiff.engine import outage
from drive import drive

outage.PATIENCE_S = 3
drive(*map(Path, sys.argv[1:]), row_ms=10)
"""


@pytest.mark.parametrize(
    ("size", "command", "reason"),
    [("300k", "true", "ENOSPC"), ("100m", "chattr -R +i images metadata", "EPERM")],
    ids=["full", "read-only"],
)
def test_a_disk_that_is_full_or_read_only_leaves_a_run_that_can_be_continued(
    tmp_path: Path, write_prompts: WritePrompts, drive: Drive, size: str, command: str, reason: str
) -> None:
    disk, log, saved = tmp_path / "disk", tmp_path / "renders.log", tmp_path / "saved"
    disk.mkdir()
    manifest = write_prompts([f"prompt {number}" for number in range(400)])
    program = tmp_path / "impatient.py"
    program.write_text(IMPATIENT)
    script = f"""
        mount -t tmpfs -o size={size} tmpfs {disk} || exit 77
        (for try in {{1..600}}; do [ -f {log} ] && break; sleep 0.1; done
         cd {disk}/out && {command}) &
        {sys.executable} {program} {manifest} {disk}/out {log} 2> {tmp_path}/stderr
        wait; cp -r {disk}/out {saved}
    """
    run = subprocess.run(["unshare", "--mount", "bash", "-c", script], check=False, timeout=200)
    if run.returncode in (1, 77):
        pytest.skip("mounting a disk of its own needs root")
    said = (tmp_path / "stderr").read_text()
    assert "DiskError" in said
    assert reason in said
    assert "the same command then continues the run" in said
    num_done = read_results(saved).num_rows
    assert num_done < 400
    summary = drive(manifest, saved, log)
    assert (summary.completed, summary.ended) == (400, 400 - num_done)
    assert not [problem for problem in Verification(saved) if problem.is_error]
