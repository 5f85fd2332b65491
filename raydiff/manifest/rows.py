"""Turn manifest rows into validated requests: the row's value, else the run's default, else the
model's. One bad row becomes one error; it never stops the rows after it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydiff.config import RunConfig
from raydiff.errors import ConfigError, ModelError, RowError
from raydiff.manifest.init_images import find_init_image, forget_objects
from raydiff.manifest.reader import Manifest
from raydiff.manifest.schema import COLUMNS, MAX_SEED, check_value, extra_columns, known_values
from raydiff.manifest.seeds import derive_seed
from raydiff.object_storage import is_object_uri, split_uri
from raydiff.request import ManifestRow, ModelInfo, RenderRequest, Task, with_request_id

Models = Callable[[str], ModelInfo]

FAMILY_TITLES = {"sd21": "SD 2.1", "sdxl": "SDXL"}


def read_rows(
    manifest: Manifest, *, config: RunConfig, models: Models, start_row: int = 0
) -> Iterator[ManifestRow]:
    """Yield one ManifestRow for each image of each row from `start_row` on, or one with its error.

    `models` finds and remembers a model by name; its ModelError becomes the row's error where
    the row names the model. Row numbers in messages are row indices, counted from 0. Raises
    ConfigError at once for a default that no row could use, ManifestError for a damaged file.
    """
    return _rows(manifest, config, row_rules(manifest, config, models), start_row)


def row_rules(manifest: Manifest, config: RunConfig, models: Models) -> "RowRules":
    """Return the rules that the rows of a run keep. Raises ConfigError, ModelError."""
    _run_defaults(config)
    forget_objects()
    root = config.input.root
    if root is not None and is_object_uri(root):
        split_uri(root)
    elif root is not None and not Path(root).expanduser().is_dir():
        raise ConfigError(f"input.root: {root} is not a folder. Name the init images' folder.")
    rules = RowRules(manifest, config, models)
    if "model" not in manifest.schema.names:
        rules.check_run_sizes()
    return rules


def extra_schema(manifest: Manifest) -> pa.Schema:
    """Return the schema of the columns that pass through, under their names in the metadata.

    A name that the metadata uses itself gets the prefix `manifest_`.
    """
    renamed = extra_columns(manifest.schema)
    return pa.schema(
        [pa.field(new, manifest.schema.field(old).type) for old, new in renamed.items()]
    )


def _rows(
    manifest: Manifest, config: RunConfig, rules: "RowRules", start_row: int
) -> Iterator[ManifestRow]:
    schema = extra_schema(manifest)
    extra_names = list(extra_columns(manifest.schema))
    for first_row, batch in manifest.batches(start_row):
        extras = pa.RecordBatch.from_arrays([batch.column(n) for n in extra_names], schema=schema)
        for offset, given in enumerate(known_values(batch)):
            row_index = first_row + offset
            if config.limit is not None and row_index >= config.limit:
                return
            extra = extras.slice(offset, 1) if extra_names else None
            yield from _images(row_index, given, rules, extra)


def _images(
    row_index: int, given: dict[str, Any], rules: "RowRules", extra: pa.RecordBatch | None
) -> Iterator[ManifestRow]:
    try:
        seed, num_images, values = rules.apply(row_index, given)
    except RowError as error:
        message = f"row {row_index}: {error}"
        yield ManifestRow(
            row_index=row_index, image_index=0, request=None, error=message, extra=extra
        )
        return
    for image_index in range(num_images):
        request = with_request_id(RenderRequest(**values, seed=seed + image_index))
        yield ManifestRow(
            row_index=row_index, image_index=image_index, request=request, error=None, extra=extra
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """A model, and what a row that names nothing else asks of it."""

    info: ModelInfo
    title: str
    defaults: dict[str, Any]


class RowRules:
    """The rules of a row that need more than one value: the run's defaults, the model, files."""

    def __init__(self, manifest: Manifest, config: RunConfig, models: Models) -> None:
        root = config.input.root
        self._root: Path | str | None = manifest.folder
        if root:
            self._root = root if is_object_uri(root) else Path(root).expanduser()
        self._config = config
        self._models = models
        self._targets: dict[str, _Target] = {}
        self._refused: dict[str, str] = {}

    def apply(self, row_index: int, given: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
        """Return the first seed, the number of images and every other field of the requests.

        Raises RowError with all that is wrong with the row.
        """
        values, problems = _check_values(given)
        try:
            target = self._target(values.get("model"))
        except RowError as error:
            raise RowError(" ".join([*problems, str(error)])) from None
        merged = {**target.defaults, **values}
        problems += _size_problems(values, merged, target)
        problems += _video_problems(values, target)
        problems += _strength_problems(values, merged)
        try:
            merged |= self._task_fields(values, target)
        except RowError as error:
            problems.append(str(error))
        seed = merged["seed"]
        if seed is None:
            seed = derive_seed(values, row_index)
        if seed + merged["num_images"] - 1 > MAX_SEED:
            problems.append(f"seed is {seed}; with num_images it passes 2^63 - 1. Lower it.")
        if problems:
            raise RowError(" ".join(problems))
        return seed, merged["num_images"], {name: merged[name] for name in _FIELDS}

    def check_run_sizes(self) -> None:
        """Raise ConfigError if the run's default size cannot be the run's model's."""
        target = self._target(None)
        problems = list(_size_problems({}, target.defaults, target))
        if problems:
            raise ConfigError(" ".join(problems))

    def _target(self, own_model: str | None) -> _Target:
        """Return the row's model or the run's; only the row's own is the row's error."""
        name = self._config.model.name if own_model is None else own_model
        if name in self._refused:  # a wrong name is asked for once, not in each of a million rows
            raise RowError(self._refused[name])
        if name not in self._targets:
            try:
                info = self._models(name)
            except ModelError as error:
                if own_model is None:
                    raise
                self._refused[name] = f"model: {error}"
                raise RowError(self._refused[name]) from None
            self._targets[name] = _target(info, self._config)
        return self._targets[name]

    def _task_fields(self, values: dict[str, Any], target: _Target) -> dict[str, Any]:
        task = _task(values, target)
        if task.startswith("txt2"):
            return {"task": task, "strength": None, "init_image": None}
        path, sha256 = find_init_image(values["init_image"], self._root)
        return {"task": task, "init_image": path, "init_image_sha256": sha256}


_FIELDS = [
    field.name for field in fields(RenderRequest) if field.name not in ("seed", "request_id")
]


def _target(info: ModelInfo, config: RunConfig) -> _Target:
    of_model = {
        "model": info.name,
        "model_revision": info.revision,
        "height": info.default_height,
        "width": info.default_width,
        "num_inference_steps": info.default_num_inference_steps,
        "guidance_scale": info.default_guidance_scale,
        "guidance_rescale": 0.0,
        "sampler": info.default_sampler,
        "strength": info.default_strength,
        "negative_prompt": None,
        "seed": None,
        "init_image_sha256": None,
        "video": None,
    }
    title = FAMILY_TITLES.get(info.family, info.family)
    return _Target(info=info, title=title, defaults=of_model | _run_defaults(config))


def _run_defaults(config: RunConfig) -> dict[str, Any]:
    """Return the defaults that the run sets, checked like a row's values."""
    defaults = {name: value for name, value in config.defaults if value is not None}
    values, problems = _check_values({"prompt": "", **defaults})
    if problems:
        raise ConfigError(f"defaults: {' '.join(problems)}")
    del values["prompt"]
    return values


def _check_values(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that keep their column's rule, and what is wrong with the others."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in given.items():
        try:
            values[name] = check_value(name, value)
        except RowError as error:
            problems.append(str(error))
    if "prompt" not in given:
        problems.append("prompt is null; every row needs one. It may be an empty text.")
    return values, problems


def _size_problems(
    values: dict[str, Any], merged: dict[str, Any], target: _Target
) -> Iterator[str]:
    multiple = target.info.size_multiple
    for name in ("height", "width"):
        size = merged[name]
        if size % multiple:
            column = COLUMNS[name]
            below = size - size % multiple
            fitting = [n for n in (below, below + multiple) if column.low <= n <= column.high]
            subject = name if name in values else f"defaults.{name}"
            yield (
                f"{subject} is {size}; {target.title} needs a multiple of {multiple}. "
                f"Use {' or '.join(map(str, fitting))}."
            )


def _video_problems(values: dict[str, Any], target: _Target) -> Iterator[str]:
    if values.get("num_frames", 1) != 1:
        yield f"num_frames is {values['num_frames']}; {target.title} makes images. Leave it null."
    if "frame_rate" in values:
        yield f"frame_rate is {values['frame_rate']}; {target.title} makes images. Leave it null."


def _strength_problems(values: dict[str, Any], merged: dict[str, Any]) -> Iterator[str]:
    """img2img runs the last int(steps * strength) steps, as the reference does: at least one."""
    steps, strength = merged["num_inference_steps"], merged["strength"]
    if "init_image" in values and int(steps * strength) < 1:
        least = math.ceil(1000 / steps) / 1000
        yield f"strength is {strength}; it leaves none of {steps} steps. Use {least} or more."


def _task(values: dict[str, Any], target: _Target) -> Task:
    """Return the task that is named, or the one that having or lacking an init image implies."""
    has_image = "init_image" in values
    state = "given" if has_image else "null"
    offered = target.info.tasks
    task: Task | None = values.get("task")
    if task is None:
        for candidate in offered:
            if candidate.startswith("img2") == has_image:
                return candidate
        raise RowError(
            f"init_image is {state}; {target.title} offers {' and '.join(offered)} only."
        )
    if task not in offered:
        raise RowError(
            f"task is {task}; {target.title} offers {' and '.join(offered)}. Choose one of these."
        )
    if task.startswith("img2") != has_image:
        remedy = "Leave one of them out" if has_image else "Give an image, or leave task null"
        raise RowError(f"task is {task} and init_image is {state}. {remedy}.")
    return task
