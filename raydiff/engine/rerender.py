"""Images of a run rendered again from their metadata alone, in this process, and compared with what
the run wrote."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydiff.config import MemoryConfig, ModelConfig
from raydiff.engine.recorded_run import recorded_config
from raydiff.engine.renderers import PipelineRenderer
from raydiff.errors import InputError, ModelError, OutputError, RowError
from raydiff.manifest.init_images import find_init_image
from raydiff.memory.gpus import visible_gpus
from raydiff.memory.profiles import compute_dtype
from raydiff.output.frames import read_image
from raydiff.output.media import encode_image
from raydiff.output.media_files import describe_media, open_media
from raydiff.output.metadata_schema import REQUEST_COLUMNS
from raydiff.output.similarity import FrameComparison, Similarity
from raydiff.output.writer import request_metadata
from raydiff.request import RenderRequest, with_request_id
from raydiff.weights.resolve import resolve_model

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rerendered:
    """An image rendered again."""

    row_index: int
    request_id: str
    file_name: str
    sha256: str
    recorded_sha256: str
    similarity: Similarity | None
    """To the run's own image; None where the files are equal."""
    device: str
    recorded_device: str
    data: bytes
    """The new file."""

    @property
    def is_equal(self) -> bool:
        """Whether it is the file that the run wrote, byte for byte."""
        return self.sha256 == self.recorded_sha256

    @property
    def max_abs(self) -> int:
        """Largest difference of a channel of a pixel to the run's own image, 0..255."""
        return 0 if self.similarity is None else self.similarity.max_abs


class Rerenderer:
    """Renders rows of one run again, one at a time; keeps the last model loaded."""

    def __init__(self, out: str | Path, *, model: str | None = None) -> None:
        """`model` is where the run's checkpoint is now, if it moved. Raises OutputError."""
        self._out = out
        self._config = recorded_config(out)
        self._moved_to = model
        self._renderer: PipelineRenderer | None = None
        self._device = ""
        self._renders: tuple[object, ...] = ()

    def render(self, row: Row) -> Rerendered:
        """Render the request of a metadata row, in a batch of the size that it was in, with as
        many CPU threads.

        Raises InputError where what it was made of is gone or has changed, MediaError where the
        image to compare with is gone, RowError where it cannot be rendered any more.
        """
        request = _request(row)
        renderer = self._load(row)
        asked = replace(request, model=self._name(row))
        if row["num_threads"] is not None:
            torch.set_num_threads(row["num_threads"])
        batch = renderer.render([asked] * (row["batch_size"] or 1))
        if batch.errors is not None and batch.errors[0] is not None:
            raise RowError(f"row {row['row_index']}: {batch.errors[0]}")
        # A file says which version wrote it.
        metadata = request_metadata(request) | {"raydiff_version": row["raydiff_version"]}
        data = encode_image(batch.pixels[0], config=self._config.output, metadata=metadata)
        sha256 = hashlib.sha256(data).hexdigest()
        similarity = None if sha256 == row["sha256"] else self._compare(row, data)
        return Rerendered(
            row_index=row["row_index"],
            request_id=request.request_id,
            file_name=describe_media(row) or "",
            sha256=sha256,
            recorded_sha256=row["sha256"],
            similarity=similarity,
            device=self._device,
            recorded_device=row["device"],
            data=data,
        )

    def _load(self, row: Row) -> PipelineRenderer:
        """Return a renderer with the row's model under the row's profile and dtype."""
        wanted = (self._name(row), row["model_revision"], row["profile"], row["dtype"])
        if self._renderer is None or self._renders != wanted:
            self._renderer = None
            memory = self._config.memory.model_copy(update={"profile": row["profile"]})
            config = _with_dtype(self._config.model, memory, row["dtype"])
            info = resolve_model(
                self._name(row),
                revision=_pinned(row["model_revision"]),
                variant=config.variant,
                dtype=self._config.model.dtype,
            )
            if info.revision != row["model_revision"]:
                raise ModelError(
                    f"{info.name}: it is revision {info.revision} now; row {row['row_index']} was "
                    f"rendered with {row['model_revision']}. Put the old files back, or say where "
                    "they are: --model FOLDER."
                )
            renderer = PipelineRenderer(model=config, memory=memory, preload=info)
            self._device = renderer.start()
            self._renderer, self._renders = renderer, wanted
        return self._renderer

    def _name(self, row: Row) -> str:
        name: str = row["model"]
        is_runs_own = name == self._config.model.name
        return self._moved_to if is_runs_own and self._moved_to is not None else name

    def _compare(self, row: Row, data: bytes) -> Similarity:
        with open_media(self._out, row) as file:
            before = np.asarray(read_image(file))
        after = np.asarray(read_image(io.BytesIO(data)))
        if before.shape != after.shape:
            raise OutputError(
                f"{describe_media(row)}: it is {before.shape[1]}x{before.shape[0]}; the metadata "
                f"says {row['width']}x{row['height']}. The file was changed."
            )
        comparison = FrameComparison()
        comparison.add(before, after)
        return comparison.result()


def _request(row: Row) -> RenderRequest:
    """Return the request that a row was rendered for."""
    if row["status"] != "completed":
        raise InputError(
            f"row {row['row_index']} is {row['status']}: {row['error']}. There is no image to make "
            "again; `raydiff retry-failed` tries such rows once more."
        )
    request = with_request_id(RenderRequest(**{name: row[name] for name in REQUEST_COLUMNS}))
    if request.request_id != row["request_id"]:
        raise InputError(
            f"row {row['row_index']}: its request_id is {row['request_id']}; its columns give "
            f"{request.request_id} in this version. Use raydiff {row['raydiff_version']}."
        )
    if request.init_image is not None:
        _check_init_image(request, row["row_index"])
    return request


def _check_init_image(request: RenderRequest, row_index: int) -> None:
    folder, _, name = str(request.init_image).rpartition("/")
    try:
        _, sha256 = find_init_image(name, folder or "/")
    except RowError as error:
        raise InputError(f"row {row_index}: {error}") from None
    if sha256 != request.init_image_sha256:
        raise InputError(
            f"row {row_index}: init_image {request.init_image} has the sha256 {sha256}; it had "
            f"{request.init_image_sha256}. Put the old file back."
        )


def _with_dtype(model: ModelConfig, memory: MemoryConfig, dtype: str) -> ModelConfig:
    """Return the run's model section, with the dtype named where `auto` is another one here."""
    gpu = next(iter(visible_gpus()), None)
    if compute_dtype(model.dtype, memory, gpu) == dtype:
        return model
    return model.model_copy(update={"dtype": dtype})


def _pinned(revision: str) -> str | None:
    return None if revision.startswith("local-") else revision
