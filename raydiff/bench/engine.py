"""What the engine itself costs: rows without a model, through driver, Ray, writer and ledger."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydiff.bench.null_model import MODEL
from raydiff.config import RunConfig
from raydiff.engine.known_models import KnownModels
from raydiff.engine.placement import fused_layout
from raydiff.engine.render import run_manifest
from raydiff.manifest.reader import open_manifest
from raydiff.output.ledger import read_results
from raydiff.output.progress import Progress

RENDERER = "raydiff.bench.null_renderer:NullRenderer"
FIRST_SAMPLE_ROWS = 10_000
"""Memory is compared from here on: buffers and windows are full by then."""
ROWS_PER_GROUP = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """One measurement. Times leave the starts of Ray and of the workers out."""

    num_rows: int
    num_workers: int
    batch_size: int
    row_ms: float
    rows_per_s: float
    elapsed_s: float
    """From the first finished row to the last."""
    total_s: float
    """Of the whole run, starts included."""
    rss_first_bytes: int
    """The driver's, after 10,000 rows (or the first progress, if there are fewer)."""
    rss_last_bytes: int
    overhead: float | None
    """0..1: share of the workers' time, each from the end of its first batch to that of its last,
    that did not go into rows; None where rows take no time."""

    @property
    def rss_growth_bytes(self) -> int:
        """What the driver's memory grew by, from the first sample to the end."""
        return self.rss_last_bytes - self.rss_first_bytes


class _Samples:
    """Rows done, time and memory, as the run's progress goes by."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int]] = []

    def __call__(self, progress: Progress) -> None:
        if progress.done:
            self._samples.append((time.monotonic(), progress.done, _rss_bytes()))

    @property
    def first(self) -> tuple[float, int, int]:
        return self._samples[0]

    @property
    def last(self) -> tuple[float, int, int]:
        return self._samples[-1]

    @property
    def rss_first_bytes(self) -> int:
        enough = (rss for _, done, rss in self._samples if done >= FIRST_SAMPLE_ROWS)
        return next(enough, self.first[2])


def bench_engine(
    *,
    num_rows: int,
    out: str | Path,
    num_workers: int = 2,
    batch_size: int = 16,
    row_ms: float = 1,
    output_format: str = "files",
) -> EngineReport:
    """Run `num_rows` rows that take `row_ms` each, into the new folder `out`: real, tiny files."""
    out = Path(out)
    manifest = out.with_name(f"{out.name}-manifest.parquet")
    write_manifest(manifest, num_rows)
    samples = _Samples()
    config = RunConfig.model_validate(
        {
            "out": str(out),
            "model": {"name": MODEL.name},
            "engine": {"workers": num_workers, "batch_size": batch_size},
            "output": {"format": output_format},
        }
    )
    summary = run_manifest(
        open_manifest(manifest),
        config=config,
        models=KnownModels(lambda name: MODEL),
        renderer=RENDERER,
        arguments={"row_ms": row_ms},
        layout=fused_layout(num_workers),
        on_progress=samples,
    )
    (started, done_then, _), (ended, done, rss_last) = samples.first, samples.last
    elapsed_s = ended - started
    return EngineReport(
        num_rows=num_rows,
        num_workers=num_workers,
        batch_size=batch_size,
        row_ms=row_ms,
        rows_per_s=(done - done_then) / elapsed_s if elapsed_s else float("nan"),
        elapsed_s=elapsed_s,
        total_s=summary.elapsed_s,
        rss_first_bytes=samples.rss_first_bytes,
        rss_last_bytes=rss_last,
        overhead=_overhead(out, row_ms / 1000) if row_ms else None,
    )


def _overhead(out: Path, row_s: float) -> float | None:
    """Compare each worker's time with what its rows alone take; None before second batches."""
    results = read_results(out, ["worker_id", "batch_size", "finished_at"])
    ideal_s = wall_s = 0.0
    for worker_id in pc.unique(results["worker_id"]):
        rows = results.filter(pc.equal(results["worker_id"], worker_id)).sort_by("finished_at")
        ended = rows["finished_at"].cast(pa.int64()).to_numpy() / 1e6
        num_first = rows["batch_size"][0].as_py()
        ideal_s += (len(ended) - num_first) * row_s
        wall_s += ended[-1] - ended[num_first - 1]
    return 1 - ideal_s / wall_s if wall_s else None


def write_manifest(path: Path, num_rows: int) -> None:
    """Write a manifest of different prompts; memory does not grow with it."""
    schema = pa.schema([("prompt", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for table in _tables(num_rows, schema):
            writer.write_table(table)


def _tables(num_rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
    for first in range(0, num_rows, ROWS_PER_GROUP):
        rows = range(first, min(first + ROWS_PER_GROUP, num_rows))
        prompts = [f"a lighthouse at dusk, number {row}" for row in rows]
        yield pa.table({"prompt": prompts}, schema=schema)


def _rss_bytes() -> int:
    """Return this process's resident memory, its peak where /proc is missing."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(pages) * resource.getpagesize()
