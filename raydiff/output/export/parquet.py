"""An export as Parquet files with the images inside."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from raydiff.output.export.dataset_card import MEDIA_TYPE
from raydiff.output.export.rows import Chunk, ExportRows, Sample
from raydiff.output.export.targets import ShardLimits, Target, free_names
from raydiff.output.media_files import is_video
from raydiff.output.staged_file import StagedFile
from raydiff.output.storage import Storage


class ParquetTarget(Target):
    """data/train-00000.parquet and on: a column of images (and one of videos, if there are any) as
    `datasets` stores them, then the metadata; a row group for each chunk, small enough to stream.
    """

    def __init__(self, dest: Storage, rows: ExportRows, limits: ShardLimits) -> None:
        super().__init__(dest, rows, limits)
        kinds = {"image": rows.has_images, "video": rows.has_videos}
        self.media = [kind for kind, is_there in kinds.items() if is_there]
        names = free_names(rows.schema.names, lambda name: name in kinds)
        fields = [rows.schema.field(old).with_name(new) for old, new in names.items()]
        features = {kind: {"_type": kind.capitalize()} for kind in self.media}
        info = {"huggingface": json.dumps({"info": {"features": features}})}
        self.file_schema = pa.schema(
            [*((kind, MEDIA_TYPE) for kind in self.media), *fields], metadata=info
        )
        self._shards: dict[str, ParquetFile] = {}
        self._numbers: Counter[str] = Counter()

    def add(self, chunk: Chunk) -> None:
        self.count(chunk)
        num_bytes = sum(len(sample.data) for sample in chunk.samples)
        shard = self._shards.get(chunk.split)
        if shard is not None and shard.is_full(num_bytes, self.limits):
            self.file_bytes += self._shards.pop(chunk.split).publish()
            shard = None
        if shard is None:
            shard = self._shards[chunk.split] = self._begin(chunk.split)
        media = [_media_column(chunk.samples, kind) for kind in self.media]
        shard.append(pa.table([*media, *chunk.rows.columns], schema=self.file_schema), num_bytes)

    def finish(self) -> None:
        for shard in self._shards.values():
            self.file_bytes += shard.publish()

    @property
    def paths(self) -> dict[str, str]:
        return {split: f"data/{split}-*.parquet" for split in self.num_samples}

    @property
    def loading(self) -> str:
        return f'datasets.load_dataset(".", split="{next(iter(self.paths))}", streaming=True)'

    @property
    def card_schema(self) -> pa.Schema | None:
        return self.file_schema

    def _begin(self, split: str) -> "ParquetFile":
        name = f"data/{split}-{self._numbers[split]:05d}.parquet"
        self._numbers[split] += 1
        staged = self.open.enter_context(StagedFile(self.dest, name))
        shard = ParquetFile(name, staged, self.file_schema, self.media)
        self.open.callback(shard.close)
        return shard


class ParquetFile:
    """A Parquet file that is being written, a row group at a time."""

    def __init__(self, name: str, staged: StagedFile, schema: pa.Schema, media: list[str]) -> None:
        self.name = name
        self._staged = staged
        self._num_rows = 0
        self._num_bytes = 0
        plain_names = [name for name in schema.names if name not in media]
        # Images are compressed already, and no two are equal.
        compression = dict.fromkeys(plain_names, "zstd")
        compression |= {f"{kind}.bytes": "none" for kind in media}
        self._writer = pq.ParquetWriter(
            staged.path,
            schema,
            compression=compression,
            use_dictionary=plain_names,
            write_statistics=plain_names,
        )

    def is_full(self, num_bytes: int, limits: ShardLimits) -> bool:
        """Tell whether another row group of `num_bytes` belongs into the next shard."""
        return self._num_rows > 0 and self._num_bytes + num_bytes > limits.num_bytes

    def append(self, table: pa.Table, num_bytes: int = 0) -> None:
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._num_rows += table.num_rows
        self._num_bytes += num_bytes

    def close(self) -> None:
        """End the file; it still has its temporary name."""
        self._writer.close()

    def publish(self) -> int:
        """Give it its name and return its size."""
        self.close()
        return self._staged.publish()


def _media_column(samples: list[Sample], kind: str) -> pa.Array:
    values = (
        {"bytes": one.data, "path": f"{one.key}.{one.ending}"} if _kind(one) == kind else None
        for one in samples
    )
    return pa.array(list(values), MEDIA_TYPE)


def _kind(sample: Sample) -> str:
    return "video" if is_video(f".{sample.ending}") else "image"
