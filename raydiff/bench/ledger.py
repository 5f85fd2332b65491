"""What it costs to come back to a run of millions of rows: resume, plan and status of a generated
manifest and ledger, each in a process of its own, within bounds of time and memory."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from raydiff.bench.generated_run import MANIFEST, OUT, bench_config, generate_run, open_run
from raydiff.bench.null_model import MODEL
from raydiff.engine.known_models import KnownModels
from raydiff.engine.plan import plan
from raydiff.manifest.reader import open_manifest
from raydiff.manifest.rows import extra_schema
from raydiff.output.ledger import Ledger
from raydiff.output.progress import read_progress

MAX_WALL_S = 30.0
MAX_RSS_BYTES = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one command did, less the imports."""

    name: str
    wall_s: float
    cpu_s: float
    """What it would take on a quiet machine, but for waits for the disk."""
    peak_rss_bytes: int
    """Of its whole process."""
    num_done: int
    """Rows that it found to have ended."""
    num_expected: int

    @property
    def is_good(self) -> bool:
        """Whether it counted right and took no more time and memory than it may."""
        is_within = self.wall_s <= MAX_WALL_S and self.peak_rss_bytes <= MAX_RSS_BYTES
        return is_within and self.num_done == self.num_expected


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerReport:
    """A generated run and what was measured on it."""

    num_rows: int
    num_parts: int
    ledger_bytes: int
    num_torn: int
    """Rows of the last part, which is cut in half: they are to be rendered again."""
    measurements: tuple[Measurement, ...]

    @property
    def is_good(self) -> bool:
        """Whether every measurement is."""
        return all(one.is_good for one in self.measurements)


def bench_ledger(
    *, num_rows: int, folder: str | Path, on_step: Callable[[str], None]
) -> LedgerReport:
    """Generate a run of `num_rows` ended rows in the empty `folder`, tear its last part, and
    measure plan, status and resume. `on_step` is told what comes next.
    """
    folder = Path(folder)
    on_step(f"generating {num_rows:,} rows")
    run = generate_run(folder, num_rows)
    measurements = []
    for name, measure, num_expected in (
        ("plan of the manifest", _plan_new, 0),
        ("plan of the run", _plan_run, num_rows - run.num_torn),
        ("status", _status, num_rows - run.num_torn),
        ("resume", _resume, num_rows - run.num_torn),
    ):
        on_step(name)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(_measured, name, measure, folder, num_expected).result()
        measurements.append(measured)
    return LedgerReport(
        num_rows=num_rows,
        num_parts=run.num_parts,
        ledger_bytes=run.ledger_bytes,
        num_torn=run.num_torn,
        measurements=tuple(measurements),
    )


def _measured(
    name: str, measure: Callable[[Path], int], folder: Path, num_expected: int
) -> Measurement:
    started, cpu_started = time.perf_counter(), time.process_time()
    num_done = measure(folder)
    return Measurement(
        name=name,
        wall_s=time.perf_counter() - started,
        cpu_s=time.process_time() - cpu_started,
        peak_rss_bytes=_peak_rss_bytes(),
        num_done=num_done,
        num_expected=num_expected,
    )


def _plan_new(folder: Path) -> int:
    config = bench_config(folder).model_copy(update={"out": None})
    return plan(config, models=KnownModels(lambda name: MODEL)).num_done


def _plan_run(folder: Path) -> int:
    return plan(bench_config(folder), models=KnownModels(lambda name: MODEL)).num_done


def _status(folder: Path) -> int:
    return read_progress(folder / OUT).done


def _resume(folder: Path) -> int:
    """Do what `render` does before its first new row."""
    manifest = open_manifest(folder / MANIFEST)
    with open_run(folder, manifest) as run:
        ledger = Ledger(
            run.out_dir,
            extra_schema=extra_schema(manifest),
            config=bench_config(folder).output,
            lock=run.lock,
        )
        return len(ledger)


def _peak_rss_bytes() -> int:
    """Return this process's peak: Linux's rusage has that of the process it was forked from too."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
