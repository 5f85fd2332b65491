"""What the engine loses when everything dies: workers, a node and the driver, on real Ray nodes.

The parent keeps the nodes and kills; a child drives, `python -m raydiff.bench.chaos JOB`, and is
killed once and started again.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.bench.chaos_renderer import BAD, POISON
from raydiff.bench.loopback_cluster import LoopbackCluster, loopback_cluster
from raydiff.bench.null_model import MODEL
from raydiff.config import RunConfig
from raydiff.engine.cluster import end_process
from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.known_models import KnownModels
from raydiff.engine.render import run_manifest
from raydiff.errors import EngineError, OutputError
from raydiff.manifest.reader import open_manifest
from raydiff.output.ledger import read_results
from raydiff.output.progress import Progress, read_progress
from raydiff.output.verify import Verification

RENDERER = "raydiff.bench.chaos_renderer:ChaosRenderer"
NUM_BAD = 5
NUM_POISON = 2
NODE_DIES_AT = 0.25
DRIVER_DIES_AT = 0.5
"""Shares of the rows that have ended."""
KILL_S = 1.0
"""Between two deaths; where workers start slower than that, the next one waits for a row to end."""
MAX_EXTRA = 0.15
POLL_S = 0.1
PATIENCE_S = 180.0
"""Without a row that ends: then it hangs."""

OnStep = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosJob:
    """What is run, and where."""

    num_rows: int = 4000
    num_nodes: int = 3
    num_workers: int = 6
    row_ms: float = 50.0
    is_split: bool = False
    seed: int = 0
    """Of the choice of who dies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosReport:
    """What became of the rows of one run."""

    num_rows: int
    completed: int
    failed: int
    quarantined: int
    num_twice: int
    """Rows that stand more than once in the metadata."""
    num_missing: int
    problems: tuple[str, ...]
    """What `verify` found, orphans of killed workers left out."""
    num_renders: int
    num_distinct: int
    """Rows rendered at least once."""
    num_killed: int
    """Workers killed by chance; poison rows killed others."""
    elapsed_s: float

    @property
    def extra(self) -> float:
        """Share of renders that were repeated."""
        return self.num_renders / max(1, self.num_distinct) - 1

    @property
    def is_good(self) -> bool:
        """Whether every good row ended exactly once, and the bad ones as they must."""
        return (
            (self.completed, self.failed, self.quarantined)
            == (self.num_rows - NUM_BAD - NUM_POISON, NUM_BAD, NUM_POISON)
            and not (self.num_twice or self.num_missing or self.problems)
            and self.extra <= MAX_EXTRA
        )


def bench_chaos(job: ChaosJob, folder: str | Path, *, on_step: OnStep) -> ChaosReport:
    """Run a job once in a new folder. Raises EngineError if it hangs or its driver gives up."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    _write_manifest(folder / "manifest.parquet", job)
    with loopback_cluster() as cluster:
        # The workers fill the nodes, so that each node has some.
        for number in _shares(job.num_workers, job.num_nodes):
            cluster.add_node(num_cpus=number)
        on_step(f"{job.num_nodes} nodes, {job.num_workers} workers")
        values = {**asdict(job), "folder": str(folder), "address": cluster.address}
        started = time.monotonic()
        num_killed = _Chaos(job, folder, cluster, on_step).run(json.dumps(values))
        elapsed_s = time.monotonic() - started
    return _report(job, folder, num_killed, elapsed_s)


class _Chaos:
    """Kills a worker each second, one node, and the driver once."""

    def __init__(
        self, job: ChaosJob, folder: Path, cluster: LoopbackCluster, on_step: OnStep
    ) -> None:
        self._job = job
        self._out = folder / "out"
        self._cluster = cluster
        self._on_step = on_step
        self._random = random.Random(job.seed)
        self._num_ended = 0
        self._killed: list[int] = []

    def run(self, arguments: str) -> int:
        """Let the drivers run to the end; return how many workers were killed."""
        with _driver(arguments) as driver:
            self._until(driver, NODE_DIES_AT)
            self._on_step(f"{self._num_ended} rows: a node dies")
            self._cluster.kill_node(self._job.num_nodes - 1)
            self._until(driver, DRIVER_DIES_AT)
            self._on_step(f"{self._num_ended} rows: the driver dies")
        with _driver(arguments) as driver:
            self._until(driver, 1.0)
            status = driver.wait(PATIENCE_S)
        if status != 1:  # 1: some rows failed, as they should
            raise EngineError(f"the driver ended with status {status}")
        self._on_step(f"{len(self._killed)} workers were killed")
        return len(self._killed)

    def _until(self, driver: "subprocess.Popen[bytes]", share: float) -> None:
        """Kill workers until this share of the rows has ended."""
        changed_at = kill_at = time.monotonic()
        num_at_kill = self._num_ended
        while self._num_ended < share * self._job.num_rows:
            now = time.monotonic()
            is_over = driver.poll() is not None
            progress = _progress(self._out)
            ended = progress.done + progress.failed + progress.quarantined if progress else 0
            if ended > self._num_ended:
                self._num_ended, changed_at = ended, now
            elif is_over:
                raise EngineError(f"the driver ended early, with status {driver.returncode}")
            if now - changed_at > PATIENCE_S:
                raise EngineError(f"no row has ended for {PATIENCE_S:.0f} s: it hangs")
            if progress is not None and now >= kill_at and self._num_ended > num_at_kill:
                kill_at, num_at_kill = now + KILL_S, self._num_ended
                self._kill_one(progress)
            time.sleep(POLL_S)

    def _kill_one(self, progress: Progress) -> None:
        pids = [worker["pid"] for worker in progress.workers if worker.get("pid")]
        ready = sorted(set(pids) - set(self._killed))
        if ready and progress.state == "running":
            self._killed.append(self._random.choice(ready))
            end_process(self._killed[-1])


@contextmanager
def _driver(arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a driver; kill it at the end, if it is still there."""
    driver = subprocess.Popen([sys.executable, "-m", "raydiff.bench.chaos", arguments])
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def _progress(out: Path) -> Progress | None:
    with suppress(OutputError):
        return read_progress(out)
    return None


def _drive(job: ChaosJob, folder: Path, address: str) -> int:
    """Run the manifest on the cluster, as `raydiff render` would, and return its exit status."""
    config = RunConfig.model_validate(
        {
            "out": str(folder / "out"),
            "model": {"name": MODEL.name},
            "engine": {
                "address": address,
                "batch_size": 4,
                # Few rows decide here, and workers die all the time.
                "max_worker_failures": 64,
            },
            "output": {"commit_s": 0.5},
        }
    )
    summary = run_manifest(
        open_manifest(folder / "manifest.parquet"),
        config=config,
        models=KnownModels(lambda name: MODEL),
        renderer=RENDERER,
        arguments={"row_ms": job.row_ms, "log": str(folder / "renders.log")},
        layout=_layout(job),
    )
    return summary.exit_status


def _layout(job: ChaosJob) -> ClusterLayout:
    """One encode and one decode worker where stages are split, the others denoise."""
    one_cpu = {"resources": {"CPU": 1.0}}
    stages: dict[str, Any] = {"fused": {"max": job.num_workers, **one_cpu}}
    if job.is_split:
        stages = {
            "encode": {"max": 1, **one_cpu},
            "denoise": {"max": job.num_workers - 2, **one_cpu},
            "decode": {"max": 1, **one_cpu},
        }
    return ClusterLayout.model_validate({"stages": stages})


def _shares(num_workers: int, num_nodes: int) -> list[int]:
    return [(num_workers + index) // num_nodes for index in range(num_nodes)]


def _write_manifest(path: Path, job: ChaosJob) -> None:
    prompts = [f"a lighthouse at dusk, number {row}" for row in range(job.num_rows)]
    rows = random.Random(job.seed).sample(range(job.num_rows), NUM_BAD + NUM_POISON)
    for row in rows[:NUM_BAD]:
        prompts[row] = f"{BAD}, {row}"
    for row in rows[NUM_BAD:]:
        prompts[row] = f"{POISON}, {row}"
    pq.write_table(pa.table({"prompt": prompts}), path)


def _report(job: ChaosJob, folder: Path, num_killed: int, elapsed_s: float) -> ChaosReport:
    results = read_results(folder / "out")
    statuses = Counter(results["status"].to_pylist())
    rows = Counter(results["row_index"].to_pylist())
    renders = Counter((folder / "renders.log").read_text("ascii").split())
    problems = (problem for problem in Verification(folder / "out") if problem.is_error)
    return ChaosReport(
        num_rows=job.num_rows,
        completed=statuses["completed"],
        failed=statuses["failed"],
        quarantined=statuses["quarantined"],
        num_twice=sum(number > 1 for number in rows.values()),
        num_missing=job.num_rows - len(rows),
        problems=tuple(problem.message for problem in problems),
        num_renders=renders.total(),
        num_distinct=len(renders),
        num_killed=num_killed,
        elapsed_s=elapsed_s,
    )


def run_chaos(job: ChaosJob, num_runs: int, *, on_step: OnStep) -> Iterator[ChaosReport]:
    """Run a job several times, each with other victims, in temporary folders."""
    with tempfile.TemporaryDirectory(prefix="raydiff-chaos-") as folder:
        for number in range(num_runs):
            values = asdict(job) | {"seed": job.seed + number}
            yield bench_chaos(ChaosJob(**values), f"{folder}/{number}", on_step=on_step)


if __name__ == "__main__":
    job_values = json.loads(sys.argv[1])
    where = {name: job_values.pop(name) for name in ("folder", "address")}
    sys.exit(_drive(ChaosJob(**job_values), Path(where["folder"]), where["address"]))
