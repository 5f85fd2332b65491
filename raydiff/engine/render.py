"""raydiff.render: a manifest into an output folder, on every GPU there is."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff.config import RunConfig
from raydiff.engine.cluster import LocalCluster, Resources
from raydiff.engine.driver import Driver
from raydiff.engine.known_models import KnownModels, known_models
from raydiff.engine.messages import Place
from raydiff.engine.plan import count_images, open_rows
from raydiff.engine.scheduler import Scheduler
from raydiff.engine.worker import WorkerSpec
from raydiff.errors import ConfigError, EngineError, InputError
from raydiff.manifest.reader import Manifest
from raydiff.manifest.rows import extra_schema, read_rows
from raydiff.memory.gpus import GpuInfo, visible_gpus
from raydiff.output.failed_rows import FailedRows, drop_failed_rows
from raydiff.output.ledger import Ledger
from raydiff.output.progress import Progress, ProgressFile
from raydiff.output.run_file import Run, start_run

RENDERER = "raydiff.engine.renderers:PipelineRenderer"
MAX_WRITE_THREADS = 4

OnProgress = Callable[[Progress], None]
OnWarning = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """How a run ended. Counts are rows, once for each of their images, of all sessions."""

    out: str
    completed: int
    failed: int
    quarantined: int
    duplicates: int
    """Rows of this session that took the file of an equal request."""
    ended: int
    """Rows that ended in this session, however they did."""
    elapsed_s: float
    is_interrupted: bool

    @property
    def exit_status(self) -> int:
        """0: all completed; 1: some did not; 130: interrupted, the same call continues it."""
        if self.is_interrupted:
            return 130
        return 1 if self.failed or self.quarantined else 0


def render(
    manifest: str | Path | None = None,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    config: RunConfig | None = None,
    retry: FailedRows | None = None,
    on_progress: OnProgress | None = None,
    on_warning: OnWarning | None = None,
) -> RunSummary:
    """Render a manifest (or the config's prompts) into the folder `out`; continue what is begun.

    manifest, out and model lie over `config`, which has every other setting. `retry` names rows
    that are to be made again though they have ended. on_progress is called a few times a second,
    on_warning with what went wrong on the way and was dealt with.
    Raises InputError where nothing can be rendered, EngineError where the run cannot go on; what
    has ended by then is committed. Rows that fail are in the metadata and in the summary.
    """
    config = _laid_over(config or RunConfig(), manifest, out, model)
    opened = open_rows(config)
    models = known_models(config.model)
    # Where rows name no model it is this one: a worker can load it before its first batch.
    preload = None if "model" in opened.schema.names else models(config.model.name)
    return run_manifest(
        opened,
        config=config,
        models=models,
        renderer=RENDERER,
        arguments={"model": config.model, "memory": config.memory, "preload": preload},
        resources=choose_resources(config, visible_gpus()),
        retry=retry,
        on_progress=on_progress,
        on_warning=on_warning,
    )


def run_manifest(
    manifest: Manifest,
    *,
    config: RunConfig,
    models: KnownModels,
    renderer: str,
    arguments: dict[str, Any],
    resources: Resources,
    retry: FailedRows | None = None,
    on_progress: OnProgress | None = None,
    on_warning: OnWarning | None = None,
) -> RunSummary:
    """Run an opened manifest with any renderer (`module:Class`). Raises what `render` does."""
    if config.out is None:
        raise ConfigError("out: there is no output folder. Name one, e.g. --out results.")
    started = time.time()
    # What no row could be rendered with is refused here, before the folder is touched.
    read_rows(manifest, config=config, models=models)
    with _start(manifest, config, models) as run:
        if retry is not None:
            drop_failed_rows(run, retry)
        extra = extra_schema(manifest)
        ledger = Ledger(run.storage, extra_schema=extra, config=config.output, lock=run.lock)
        for warning in ledger.warnings:
            (on_warning or _ignore)(warning)
        num_before = len(ledger)
        spec = worker_spec(run.out, config, renderer, arguments, resources)
        cluster = LocalCluster(resources, spec)
        total = count_images(manifest, config)
        is_one_each = total is not None and config.defaults.num_images == 1
        start_row = ledger.num_leading_rows() if is_one_each else 0
        driver = Driver(
            rows=read_rows(manifest, config=config, models=models, start_row=start_row),
            total=total,
            lookahead=config.engine.lookahead,
            ledger=ledger,
            scheduler=Scheduler(_places(resources), config.engine),
            cluster=cluster,
            progress_file=ProgressFile(run.storage, epoch=run.lock.epoch, started_at=started),
            on_progress=on_progress,
            on_warning=on_warning,
        )
        try:
            driver.run()
        except InputError as error:
            if not len(ledger):
                raise
            raise EngineError(str(error)) from error
        finally:
            cluster.close()
        return RunSummary(
            out=run.out,
            **ledger.counts,
            duplicates=driver.num_duplicates,
            ended=len(ledger) - num_before,
            elapsed_s=time.time() - started,
            is_interrupted=driver.is_interrupted,
        )


def choose_resources(config: RunConfig, gpus: Sequence[GpuInfo]) -> Resources:
    """Return how many workers to start: one per GPU, or on the CPU where there is none.

    Raises ConfigError for more workers than GPUs.
    """
    is_on_gpu = config.memory.profile != "cpu_only" or "cuda" in config.memory.devices.values()
    num_gpus = len(gpus) if is_on_gpu else 0
    asked = config.engine.workers
    if asked == "auto":
        return Resources(num_workers=max(1, num_gpus), num_gpus=num_gpus)
    if num_gpus and asked > num_gpus:
        raise ConfigError(
            f"engine.workers: {asked}: a worker takes a whole GPU, and there are {num_gpus}. "
            f"Use --workers {num_gpus}, or --profile cpu_only for workers on the CPU."
        )
    return Resources(num_workers=asked, num_gpus=min(asked, num_gpus))


def worker_spec(
    out: str,
    config: RunConfig,
    renderer: str,
    arguments: dict[str, Any],
    resources: Resources,
) -> WorkerSpec:
    """Return what every worker of the run is built from; the CPU's cores are shared out evenly."""
    num_cores = max(1, len(os.sched_getaffinity(0)) // resources.num_workers)
    environ = {"OMP_NUM_THREADS": str(num_cores), "TOKENIZERS_PARALLELISM": "false"}
    if not resources.num_gpus:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    batch_size = config.engine.batch_size
    return WorkerSpec(
        renderer=renderer,
        arguments=arguments,
        out=out,
        output=config.output,
        batch_size=None if batch_size == "auto" else batch_size,
        num_write_threads=min(MAX_WRITE_THREADS, num_cores),
        environ=environ,
    )


def _start(manifest: Manifest, config: RunConfig, models: KnownModels) -> Run:
    run = start_run(
        config.out or "",
        config=config,
        manifest_uri=manifest.uri,
        manifest_fingerprint=manifest.fingerprint,
        num_rows=manifest.num_rows,
        models=models.revisions,
    )
    models.on_found = lambda name, info: run.add_model(name, info.revision)
    return run


def _laid_over(
    config: RunConfig, manifest: str | Path | None, out: str | Path | None, model: str | None
) -> RunConfig:
    given = {"manifest": manifest, "out": out}
    update: dict[str, Any] = {key: str(value) for key, value in given.items() if value is not None}
    if model is not None:
        update["model"] = config.model.model_copy(update={"name": model})
    return config.model_copy(update=update)


def _places(resources: Resources) -> list[Place]:
    return [Place(worker_id=f"w{index}") for index in range(resources.num_workers)]


def _ignore(warning: str) -> None:
    pass
