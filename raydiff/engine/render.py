"""raydiff.render: a manifest into an output folder, on every GPU there is."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from raydiff.config import RunConfig
from raydiff.engine.cluster import ZERO_COPY, worker_environ
from raydiff.engine.cluster_file import ClusterLayout, StagePlacement
from raydiff.engine.driver import Driver
from raydiff.engine.known_models import KnownModels, known_models
from raydiff.engine.make_room import RoomMaker
from raydiff.engine.messages import Role
from raydiff.engine.metrics import MetricsObserver
from raydiff.engine.observers import Observers
from raydiff.engine.placement import places
from raydiff.engine.plan import count_images, open_rows
from raydiff.engine.run_log import RunLog
from raydiff.engine.scheduler import Scheduler
from raydiff.engine.shared_out import visible_mark
from raydiff.engine.summary import SessionSummary, SummaryObserver
from raydiff.engine.worker import WorkerSpec
from raydiff.engine.worker_pool import WorkerPool
from raydiff.engine.workplace import Workplace, open_workplace
from raydiff.errors import ConfigError, EngineError, InputError, RaydiffError
from raydiff.manifest.reader import Manifest
from raydiff.manifest.rows import extra_schema, read_rows
from raydiff.output.failed_rows import FailedRows, drop_failed_rows
from raydiff.output.ledger import Ledger
from raydiff.output.progress import Progress, ProgressFile
from raydiff.output.run_file import Run, start_run
from raydiff.output.shards.writer import ShardPublisher
from raydiff.output.storage import open_storage
from raydiff.request import ModelInfo

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
    session: SessionSummary | None = None
    """Where the time of this session went."""

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
    # On a cluster the nodes that load a model fetch it, each what its stages need.
    models = known_models(config.model, config.ltx2, is_loaded_here=config.engine.address is None)
    # Where rows name no model it is this one: a worker can load it before its first batch.
    preload = None if "model" in opened.schema.names else models(config.model.name)
    return run_manifest(
        opened,
        config=config,
        models=models,
        renderer=RENDERER,
        arguments=renderer_arguments(config, preload),
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
    layout: ClusterLayout | None = None,
    retry: FailedRows | None = None,
    on_progress: OnProgress | None = None,
    on_warning: OnWarning | None = None,
) -> RunSummary:
    """Run an opened manifest with any renderer (`module:Class`). Raises what `render` does.

    The layout is chosen by the settings and the machines there are, if none is given.
    """
    if config.out is None:
        raise ConfigError("out: there is no output folder. Name one, e.g. --out results.")
    started = time.time()
    # What no row could be rendered with is refused here, before the folder is touched.
    read_rows(manifest, config=config, models=models)
    _check_encoders(manifest, config, models)
    with (
        open_workplace(config, models, layout) as workplace,
        _start(manifest, config, models) as run,
        ExitStack() as stack,
    ):
        if retry is not None:
            drop_failed_rows(run, retry)
        ledger = Ledger(
            run.storage, extra_schema=extra_schema(manifest), config=config.output, lock=run.lock
        )
        session = _Session(run, ledger, workplace, config=config, on_warning=on_warning)
        stack.callback(session.log.release)  # where `on_progress` raises, say
        driver = session.driver(
            manifest,
            models,
            specs=worker_specs(run.out, config, renderer, arguments, workplace.layout),
            stack=stack,
            on_progress=on_progress,
        )
        error: RaydiffError | None = None
        try:
            driver.run()
        except RaydiffError as raised:
            error = raised
        summary = RunSummary(
            out=run.out,
            **ledger.counts,
            duplicates=driver.num_duplicates,
            ended=len(ledger) - session.num_before,
            elapsed_s=time.time() - started,
            is_interrupted=driver.is_interrupted,
            session=session.summary.summary(time.monotonic()),
        )
        session.observers.close(asdict(summary) | ({"error": str(error)} if error else {}))
        if isinstance(error, InputError) and len(ledger):
            raise EngineError(str(error)) from error
        if error is not None:
            raise error
        return summary


class _Session:
    """What one session of a run has beside its workers: ledger, observers, and a driver."""

    def __init__(
        self,
        run: Run,
        ledger: Ledger,
        workplace: Workplace,
        *,
        config: RunConfig,
        on_warning: OnWarning | None,
    ) -> None:
        self._run = run
        self._ledger = ledger
        self._workplace = workplace
        self._config = config
        self._on_warning = on_warning
        self.num_before = len(ledger)
        stages = workplace.layout.by_role.values()
        num_threads = min(_num_write_threads(placement) for placement in stages)
        self.summary = SummaryObserver(num_write_threads=num_threads)
        about = run.file.sessions[-1].model_dump(exclude={"epoch"})
        number = {role: stage.num_workers for role, stage in workplace.layout.by_role.items()}
        self.log = RunLog(run.storage, run.lock.epoch, session={**about, "workers": number})
        name = PurePosixPath(run.out).name
        metrics = MetricsObserver(partial(workplace.session.metrics, run=name))
        self.observers = Observers([self.summary, self.log, metrics])
        for warning in filter(None, [*ledger.warnings, run.lock.warning]):
            self.observers.warning(warning)
            if on_warning is not None:
                on_warning(warning)

    def driver(
        self,
        manifest: Manifest,
        models: KnownModels,
        *,
        specs: dict[Role, WorkerSpec],
        stack: ExitStack,
        on_progress: OnProgress | None,
    ) -> Driver:
        """Return the driver of the rows that have not ended."""
        config, run, workplace, ledger = self._config, self._run, self._workplace, self._ledger
        total = count_images(manifest, config)
        is_one_each = total is not None and config.defaults.num_images == 1
        start_row = ledger.num_leading_rows() if is_one_each else 0
        has_shards = config.output.format == "webdataset"
        publisher = ShardPublisher(run.storage, config.output, fence=run.lock.check)
        path = run.storage.local_path("")
        is_shared = path is not None and not workplace.session.is_private
        pool = WorkerPool(
            workplace.session,
            workplace.layout,
            specs,
            mark=stack.enter_context(visible_mark(path)) if path and is_shared else None,
            health_timeout_s=config.engine.health_timeout_s,
            on_health=lambda worker_id, health: self.observers.health(
                worker_id, health, time.monotonic()
            ),
        )
        stack.callback(pool.close)
        return Driver(
            rows=read_rows(manifest, config=config, models=models, start_row=start_row),
            total=total,
            lookahead=config.engine.lookahead,
            ledger=ledger,
            scheduler=Scheduler(
                places(workplace.layout),
                config.engine,
                embeds_cache_bytes=workplace.embeds_cache_bytes,
                shard_s=config.output.shard_s if has_shards else float("inf"),
            ),
            pool=pool,
            progress_file=ProgressFile(run.storage, epoch=run.lock.epoch, started_at=time.time()),
            observers=self.observers,
            room=RoomMaker(places(workplace.layout), workplace.layout.by_role),
            publisher=publisher if has_shards else None,
            places_now=workplace.places_now,
            on_progress=on_progress,
            on_warning=self._on_warning,
        )


# -- its parts ------------------------------------------------------------------------------------


def worker_specs(
    out: str,
    config: RunConfig,
    renderer: str,
    arguments: dict[str, Any],
    layout: ClusterLayout,
) -> dict[Role, WorkerSpec]:
    """Return what the workers of each role are built from."""
    batch_size = config.engine.batch_size
    specs: dict[Role, WorkerSpec] = {}
    for role, placement in layout.by_role.items():
        environ = worker_environ(placement)
        if layout.is_split:
            environ |= ZERO_COPY
        specs[role] = WorkerSpec(
            renderer=renderer,
            arguments=arguments,
            role=role,
            out=out,
            output=config.output,
            batch_size=None if batch_size == "auto" else batch_size,
            num_write_threads=_num_write_threads(placement),
            environ=environ,
        )
    return specs


def _check_encoders(manifest: Manifest, config: RunConfig, models: KnownModels) -> None:
    """Raise ConfigError if clips of the run's own model could not be encoded here."""
    if "model" not in manifest.schema.names and models(config.model.name).video is not None:
        from raydiff.output.video.encoders import check_encoders  # takes what only clips need

        check_encoders(config.output)


def _num_write_threads(placement: StagePlacement) -> int:
    return min(MAX_WRITE_THREADS, placement.num_threads)


def renderer_arguments(config: RunConfig, preload: ModelInfo | None) -> dict[str, Any]:
    """Return what the renderer of a run is built from in every worker but its role."""
    return {
        "model": config.model,
        "memory": config.memory,
        "ltx2": config.ltx2.model_copy(update={"embeds": _absolute(config.ltx2.embeds)}),
        "preload": preload,
        "embeds_in": _absolute(config.out) if config.engine.embeds_on_disk else None,
    }


def _absolute(place: str | None) -> str | None:
    """A worker's folder is another one than this process's."""
    return None if place is None else open_storage(place).uri


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
