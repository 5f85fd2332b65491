"""The columns of the metadata table, in order, and the building of a table from ended rows.

row_index, image_index come from the ManifestRow; the request's fields from its request, null
if the row asked for none; a clip's settings from those of the request, null for images; the rest
from the RenderResult; then the passed-through columns.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import pyarrow as pa

from raydiff import __version__
from raydiff.request import ManifestRow, RenderResult

ROW_COLUMNS = {"row_index": pa.int64(), "image_index": pa.int32()}

REQUEST_COLUMNS = {
    "model": pa.string(),
    "task": pa.string(),
    "prompt": pa.string(),
    "negative_prompt": pa.string(),
    "seed": pa.int64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "num_inference_steps": pa.int32(),
    "guidance_scale": pa.float64(),
    "guidance_rescale": pa.float64(),
    "sampler": pa.string(),
    "strength": pa.float64(),
    "init_image": pa.string(),
    "init_image_sha256": pa.string(),
    "model_revision": pa.string(),
}

VIDEO_COLUMNS = {
    "num_frames": pa.int32(),
    "frame_rate": pa.float64(),
    "video_mode": pa.string(),
    "text_encoder": pa.string(),
    "stg_scale": pa.float64(),
    "stg_blocks": pa.list_(pa.int32()),
    "modality_scale": pa.float64(),
    "audio_guidance_scale": pa.float64(),
    "audio_stg_scale": pa.float64(),
    "audio_modality_scale": pa.float64(),
    "audio_guidance_rescale": pa.float64(),
}
"""Each is a field of VideoSettings."""

OUTCOME_COLUMNS = {
    "status": pa.string(),
    "error": pa.string(),
    "file_name": pa.string(),
    "sha256": pa.string(),
    "size_bytes": pa.int64(),
    "member": pa.string(),
    "offset": pa.int64(),
    "duration_s": pa.float64(),
    "audio_sample_rate": pa.int32(),
    "wav_sha256": pa.string(),
}

COST_COLUMNS = {
    "nfe": pa.int32(),
    "profile": pa.string(),
    "dtype": pa.string(),
    "batch_size": pa.int32(),
    "worker_id": pa.string(),
    "node": pa.string(),
    "device": pa.string(),
    "num_threads": pa.int32(),
    "encode_s": pa.float64(),
    "denoise_s": pa.float64(),
    "decode_s": pa.float64(),
    "write_s": pa.float64(),
    "peak_vram_bytes": pa.int64(),
}

COLUMNS: dict[str, pa.DataType] = {
    "request_id": pa.string(),
    **ROW_COLUMNS,
    **OUTCOME_COLUMNS,
    **REQUEST_COLUMNS,
    **VIDEO_COLUMNS,
    **COST_COLUMNS,
    "raydiff_version": pa.string(),
    "finished_at": pa.timestamp("us", "UTC"),
    "warning": pa.string(),
}

RESULT_COLUMNS = ("request_id", *OUTCOME_COLUMNS, *COST_COLUMNS, "finished_at", "warning")
"""What a RenderResult is read back from; each is one of its fields."""

REPEATING_COLUMNS = (
    *("status", "error", "model", "task", "prompt", "negative_prompt", "height", "width"),
    *("num_inference_steps", "guidance_scale", "guidance_rescale", "sampler", "strength"),
    *("init_image", "init_image_sha256", "model_revision", "profile", "dtype", "batch_size"),
    *("worker_id", "node", "device", "num_threads", "encode_s", "denoise_s", "decode_s"),
    *("peak_vram_bytes", "raydiff_version", "warning"),
    *(name for name in VIDEO_COLUMNS if name != "stg_blocks"),
    *("stg_blocks.list.element", "duration_s", "audio_sample_rate", "nfe"),
)
"""Columns whose values repeat from row to row, by their paths in Parquet: dictionary-encoded."""


def metadata_schema(extra_schema: pa.Schema) -> pa.Schema:
    """Return the table's schema: COLUMNS, then the passed-through ones."""
    clashes = [name for name in extra_schema.names if name in COLUMNS]
    if clashes:
        raise ValueError(f"column {clashes[0]!r} is both the metadata's own and passed through")
    fields = [pa.field(name, type_) for name, type_ in COLUMNS.items()]
    return pa.schema([*fields, *extra_schema]).remove_metadata()


def with_columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return the columns of these names; COLUMNS that an older version did not write are null."""
    columns = {
        name: table[name] if name in table.column_names else pa.nulls(table.num_rows, COLUMNS[name])
        for name in names
        if name in table.column_names or name in COLUMNS
    }
    return pa.table(columns)


def build_table(
    rows: Sequence[tuple[ManifestRow, RenderResult]], extra_schema: pa.Schema
) -> pa.Table:
    """Return the metadata of ended rows as a table of `metadata_schema(extra_schema)`."""
    values = _values([row for row, _ in rows], [result for _, result in rows])
    table = pa.table({name: _column(values[name], type_) for name, type_ in COLUMNS.items()})
    if len(extra_schema):
        batches = [_extra(row, extra_schema) for row, _ in rows]
        extra = pa.Table.from_batches(batches, schema=extra_schema).combine_chunks()
        for field, column in zip(extra_schema, extra.columns, strict=True):
            table = table.append_column(field, column)
    return table.cast(metadata_schema(extra_schema))


def result_of(values: dict[str, Any]) -> RenderResult:
    """Return the RenderResult that a table row with RESULT_COLUMNS was built from."""
    finished_at = values.get("finished_at")
    return RenderResult(
        **{**values, "finished_at": None if finished_at is None else finished_at.timestamp()}
    )


def _values(
    rows: Sequence[ManifestRow], results: Sequence[RenderResult]
) -> dict[str, Sequence[Any]]:
    """Return the values of all COLUMNS."""
    requests = [row.request for row in rows]
    values = {
        **_attributes(requests, tuple(REQUEST_COLUMNS)),
        **_attributes([r and r.video for r in requests], tuple(VIDEO_COLUMNS)),
        **_attributes(rows, tuple(ROW_COLUMNS)),
        **_attributes(results, RESULT_COLUMNS),
    }
    return {
        **values,
        "request_id": [request_id or None for request_id in values["request_id"]],
        "error": [result.error or row.error for row, result in zip(rows, results, strict=True)],
        "finished_at": [_microseconds(seconds) for seconds in values["finished_at"]],
        "raydiff_version": [__version__] * len(rows),
    }


def _attributes(nouns: Sequence[Any], names: tuple[str, ...]) -> dict[str, Sequence[Any]]:
    """Return attributes of all nouns by name; null for a noun that is None."""
    read = attrgetter(*names)
    nothing = (None,) * len(names)
    lines = [nothing if noun is None else read(noun) for noun in nouns]
    columns = zip(*lines, strict=True) if lines else [()] * len(names)
    return dict(zip(names, columns, strict=True))


def _column(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, type_)
    except UnicodeEncodeError:
        # A prompt or a path from outside Parquet may hold bytes that are not UTF-8.
        return pa.array(_printable(values), type_)


def _printable(values: Iterable[str | None]) -> list[str | None]:
    return [
        None if value is None else value.encode("utf-8", "backslashreplace").decode("utf-8")
        for value in values
    ]


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1_000_000)


def _extra(row: ManifestRow, schema: pa.Schema) -> pa.RecordBatch:
    if row.extra is None:
        nulls = [pa.nulls(1, field.type) for field in schema]
        return pa.RecordBatch.from_arrays(nulls, schema=schema)
    return pa.RecordBatch.from_arrays(row.extra.columns, schema=schema)
