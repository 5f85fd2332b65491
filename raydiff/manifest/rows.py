"""Turn manifest rows into validated requests: the row's value, else the run's default, else the
model's. One bad row becomes one error; it never stops the rows after it."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydiff.config import RunConfig
from raydiff.errors import ConfigError, ModelError, RowError
from raydiff.manifest.init_images import find_init_image, forget_objects
from raydiff.manifest.reader import Manifest
from raydiff.manifest.schema import MAX_SEED, extra_columns, known_values
from raydiff.manifest.seeds import derive_seed
from raydiff.manifest.targets import Target, check_values, make_target, run_defaults
from raydiff.object_storage import is_object_uri, split_uri
from raydiff.request import ManifestRow, ModelInfo, RenderRequest, Task, with_request_id

Models = Callable[[str], ModelInfo]


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
    forget_objects()
    root = config.input.root
    if root is not None and is_object_uri(root):
        split_uri(root)
    elif root is not None and not Path(root).expanduser().is_dir():
        raise ConfigError(f"input.root: {root} is not a folder. Name the init images' folder.")
    rules = RowRules(manifest, config, models)
    if "model" not in manifest.schema.names:
        rules.check_run()
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


class RowRules:
    """The rules of a row that need more than one value: the run's defaults, the model, files."""

    def __init__(self, manifest: Manifest, config: RunConfig, models: Models) -> None:
        root = config.input.root
        self._root: Path | str | None = manifest.folder
        if root:
            self._root = root if is_object_uri(root) else Path(root).expanduser()
        self._config = config
        self._run_defaults = run_defaults(config)
        self._models = models
        self._targets: dict[str, Target] = {}
        self._refused: dict[str, str] = {}

    def apply(self, row_index: int, given: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
        """Return the first seed, the number of images and every other field of the requests.

        Raises RowError with all that is wrong with the row.
        """
        values, problems = check_values(given)
        if "prompt" not in given:
            problems.append("prompt is null; every row needs one. It may be an empty text.")
        try:
            target = self._target(values.get("model"))
        except RowError as error:
            raise RowError(" ".join([*problems, str(error)])) from None
        problems += target.problems(values)
        merged = {**target.defaults, **values}
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
        merged["video"] = target.video(merged)
        return seed, merged["num_images"], {name: merged[name] for name in _FIELDS}

    def check_run(self) -> None:
        """Raise ConfigError if the run's model cannot make what the run's defaults ask for."""
        problems = list(self._target(None).run_problems(self._run_defaults))
        if problems:
            raise ConfigError(" ".join(problems))

    def _target(self, own_model: str | None) -> Target:
        """Return the row's model or the run's; only the row's own is the row's error."""
        name = self._config.model.name if own_model is None else own_model
        if name in self._refused:  # a wrong name is asked for once, not in each of a million rows
            raise RowError(self._refused[name])
        if name not in self._targets:
            try:
                info = self._models(name)
                self._targets[name] = make_target(info, self._config, self._run_defaults)
            except (ModelError, ConfigError) as error:
                if own_model is None:
                    raise
                self._refused[name] = f"model: {error}"
                raise RowError(self._refused[name]) from None
        return self._targets[name]

    def _task_fields(self, values: dict[str, Any], target: Target) -> dict[str, Any]:
        task = _task(values, target)
        if task.startswith("txt2"):
            return {"task": task, "strength": None, "init_image": None}
        path, sha256 = find_init_image(values["init_image"], self._root)
        return {"task": task, "init_image": path, "init_image_sha256": sha256}


_FIELDS = [
    field.name for field in fields(RenderRequest) if field.name not in ("seed", "request_id")
]


def _task(values: dict[str, Any], target: Target) -> Task:
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
