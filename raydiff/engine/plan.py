"""What a run would do, without doing it: rows, duplicates, bad rows, batches, what is done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from raydiff.config import RunConfig, SweepConfig
from raydiff.engine.known_models import KnownModels, known_models
from raydiff.errors import ConfigError
from raydiff.manifest.reader import AxisSummary, Manifest, open_manifest, prompts_manifest
from raydiff.manifest.row_checks import RowChecks
from raydiff.manifest.sweep import open_sweep
from raydiff.memory.gpus import GpuInfo, visible_gpus
from raydiff.memory.profiles import Profile, compute_dtype, model_profile
from raydiff.output.keys import Keys, image_keys, row_keys
from raydiff.output.lock import METADATA_DIR
from raydiff.output.part_files import map_parts
from raydiff.output.run_file import check_same_run, is_run
from raydiff.output.sorted_index import SortedIndex
from raydiff.output.storage import open_storage
from raydiff.request import BatchKey, ModelInfo
from raydiff.weights.components import STAGES, needed_components

T = TypeVar("T", bound=np.generic)

MAX_BAD_ROWS = 20
"""Messages that a report quotes; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatches:
    """The requests of one model, size and, of clips, length and rate."""

    model: str
    height: int
    width: int
    num_frames: int | None
    """None for images, as the next."""
    frame_rate: float | None
    num_requests: int
    profile: str
    batch_size: int
    num_batches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """What a run would do. Images are rows, counted once for each of their images or clips."""

    num_rows: int
    """Rows of the manifest, up to `limit`."""
    num_images: int
    num_bad: int
    bad_rows: tuple[str, ...]
    """What is wrong with the first of them."""
    num_distinct: int
    num_duplicates: int
    """Images whose request equals an earlier one's: rendered once."""
    num_done: int
    """Images whose metadata the output folder has."""
    num_new: int
    """Distinct requests that no row done has rendered: what is left to render."""
    batches: tuple[PlannedBatches, ...]
    """Of the distinct requests, done ones included, the most frequent first."""
    axes: tuple[AxisSummary, ...]
    """What the job's sweep varies."""


def plan(config: RunConfig, *, models: KnownModels | None = None) -> PlanReport:
    """Read and check every row. Raises InputError where `render` would; writes nothing.

    `models` finds the models that rows name; None finds them without fetching weights.
    Memory is about 40 bytes for each image.
    """
    manifest = open_rows(config)
    models = models or known_models(config.model, config.ltx2, is_loaded_here=False)
    checks = RowChecks(manifest, config=config, models=models, max_errors=MAX_BAD_ROWS)
    done = _done_rows(manifest, config, models)
    num_images = num_done = num_bad = 0
    requests: list[Keys] = [np.empty(0, np.uint64)]
    shapes: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    done_requests: list[NDArray[np.bool_]] = [np.empty(0, np.bool_)]
    for images in checks:
        is_done = done.contains(image_keys(images.row_index, images.image_index))
        is_good = images.shape >= 0
        num_images += len(is_good)
        num_done += int(is_done.sum())
        num_bad += int((~is_good).sum())
        requests.append(images.request[is_good])
        shapes.append(images.shape[is_good])
        done_requests.append(is_done[is_good])
    del done
    first_images, num_rendered = _distinct(_joined(requests), _joined(done_requests))
    found = _count_shapes(_joined(shapes)[first_images], checks.shapes)
    return PlanReport(
        num_rows=min(manifest.num_rows, config.limit or manifest.num_rows),
        num_images=num_images,
        num_bad=num_bad,
        bad_rows=tuple(checks.errors),
        num_distinct=len(first_images),
        num_duplicates=num_images - num_bad - len(first_images),
        num_done=num_done,
        num_new=len(first_images) - num_rendered,
        batches=tuple(_batches(found, config, models)),
        axes=manifest.axes,
    )


def _distinct(requests: Keys, is_done: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Return the first place of each distinct request, in order, and how many have one done."""
    if not len(requests):
        return np.empty(0, np.int64), 0
    order = np.argsort(requests, kind="stable")
    ordered = requests[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    num_done = int(np.logical_or.reduceat(is_done[order], starts).sum())
    return np.sort(order[starts]), num_done


def _joined(arrays: list[NDArray[T]]) -> NDArray[T]:
    """Join arrays and let go of them: there are tens of bytes for each of millions of images."""
    joined = np.concatenate(arrays)
    arrays.clear()
    return joined


def _count_shapes(
    shapes: NDArray[np.int32], known: Sequence[BatchKey]
) -> list[tuple[BatchKey, int]]:
    """Count the distinct requests of each shape, the most frequent first, then the first met."""
    found, first, counts = np.unique(shapes, return_index=True, return_counts=True)
    ranked = sorted(zip(-counts, first, found, strict=True))
    return [(known[shape], -int(negative)) for negative, _, shape in ranked]


def open_rows(config: RunConfig) -> Manifest:
    """Open the run's manifest, its prompts, or the sweep over them.

    Raises ManifestError, ConfigError.
    """
    if config.sweep != SweepConfig():
        return open_sweep(config.sweep, source=config.manifest, prompts=config.prompts)
    if config.manifest is not None:
        return open_manifest(config.manifest)
    if config.prompts:
        return prompts_manifest(config.prompts)
    raise ConfigError("manifest: there is nothing to render. Name a manifest or give prompts.")


def count_images(manifest: Manifest, config: RunConfig) -> int | None:
    """Return how many images a run makes, None where only the rows themselves say it."""
    if "num_images" in manifest.schema.names:
        return None
    num_rows = min(manifest.num_rows, config.limit or manifest.num_rows)
    return num_rows * config.defaults.num_images


def _done_rows(manifest: Manifest, config: RunConfig, models: KnownModels) -> SortedIndex:
    """Return the keys of the rows that the output folder has, if it is a run of this manifest."""
    keys: list[Keys] = [np.empty(0, np.uint64)]
    if config.out is not None and is_run(config.out):
        check_same_run(
            config.out,
            config=config,
            manifest_uri=manifest.uri,
            manifest_fingerprint=manifest.fingerprint,
            num_rows=manifest.num_rows,
            models=models.revisions,
        )
        columns = ["row_index", "image_index"]
        parts, _ = map_parts(open_storage(config.out).folder(METADATA_DIR), columns, row_keys)
        keys += parts
    return SortedIndex(np.concatenate(keys))


def _batches(
    shapes: Sequence[tuple[BatchKey, int]], config: RunConfig, models: KnownModels
) -> Iterator[PlannedBatches]:
    """Size the batches as a worker on the first GPU would."""
    gpu = next(iter(visible_gpus()), None)
    profiles: dict[str, Profile] = {}
    for key, num_requests in shapes:
        if key.model not in profiles:
            profiles[key.model] = profile_on(gpu, models(key.model), config)
        profile = profiles[key.model]
        batch_size = config.engine.batch_size
        if batch_size == "auto":
            batch_size = profile.max_batch_size(key.height, key.width, key.num_frames)
        yield PlannedBatches(
            model=key.model,
            height=key.height,
            width=key.width,
            num_frames=key.num_frames,
            frame_rate=key.frame_rate,
            num_requests=num_requests,
            profile=profile.name,
            batch_size=batch_size,
            num_batches=-(-num_requests // batch_size),
        )


def profile_on(gpu: GpuInfo | None, info: ModelInfo, config: RunConfig) -> Profile:
    """Return the memory profile of a model in a worker on this GPU, None for one without."""
    dtype = compute_dtype(config.model.dtype, config.memory, gpu)
    components = needed_components(info.num_parameters, STAGES, config.ltx2)
    return model_profile(config.memory, info, dtype, components, gpu)
