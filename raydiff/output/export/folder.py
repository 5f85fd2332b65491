"""An export as a folder of images, or of videos, with a table beside them."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from raydiff.errors import ConfigError
from raydiff.output.export.parquet import ParquetFile
from raydiff.output.export.rows import Chunk, ExportRows
from raydiff.output.export.targets import ShardLimits, Target, free_names
from raydiff.output.staged_file import StagedFile
from raydiff.output.storage import Storage

NUM_WRITERS = 8
WRITES_IN_FLIGHT = 64


class FolderTarget(Target):
    """train/ab/<request_id>.png and train/metadata.parquet, as Hugging Face's ImageFolder has it,
    and for videos its VideoFolder.

    Parquet, not JSON lines: a column that is null in the first rows, or in all rows of one split,
    keeps its type.
    """

    def __init__(self, dest: Storage, rows: ExportRows, limits: ShardLimits) -> None:
        super().__init__(dest, rows, limits)
        _check_kinds(rows)
        self._builder = "videofolder" if rows.has_videos else "imagefolder"
        names = free_names(rows.schema.names, _is_taken_in_folders)
        fields = [rows.schema.field(old).with_name(new) for old, new in names.items()]
        self._file_schema = pa.schema([("file_name", pa.string()), *fields])
        self._tables: dict[str, ParquetFile] = {}
        self._threads = ThreadPoolExecutor(NUM_WRITERS)
        self.open.callback(self._threads.shutdown, cancel_futures=True)
        self._writes: deque[Future[None]] = deque()

    def add(self, chunk: Chunk) -> None:
        self.count(chunk)
        names = [f"{one.key[:2]}/{one.key}.{one.ending}" for one in chunk.samples]
        for name, sample in zip(names, chunk.samples, strict=True):
            self._writes.append(
                self._threads.submit(
                    self.dest.put, f"{chunk.split}/{name}", sample.data, is_durable=False
                )
            )
        while len(self._writes) > WRITES_IN_FLIGHT:
            self._writes.popleft().result()
        if chunk.split not in self._tables:
            name = f"{chunk.split}/metadata.parquet"
            staged = self.open.enter_context(StagedFile(self.dest, name))
            self._tables[chunk.split] = ParquetFile(name, staged, self._file_schema, [])
            self.open.callback(self._tables[chunk.split].close)
        columns = [pa.array(names, pa.string()), *chunk.rows.columns]
        self._tables[chunk.split].append(pa.table(columns, schema=self._file_schema))

    def finish(self) -> None:
        while self._writes:
            self._writes.popleft().result()
        if self.dest.local_path("") is not None:
            os.sync()  # One by one would take several times as long.
        for table in self._tables.values():
            self.file_bytes += table.publish()

    @property
    def paths(self) -> dict[str, str]:
        return {split: f"{split}/**" for split in self.num_samples}

    @property
    def loading(self) -> str:
        return f'datasets.load_dataset("{self._builder}", data_dir=".")'


def _check_kinds(rows: ExportRows) -> None:
    """Raise ConfigError for files that neither ImageFolder nor VideoFolder takes as they are."""
    remedy = "Use --to webdataset or hf-parquet."
    if rows.has_videos and rows.has_images:
        raise ConfigError(f"--to imagefolder: the run has images and videos. {remedy}")
    if ".webm" in rows.endings:
        raise ConfigError(f"--to imagefolder: VideoFolder of `datasets` takes no .webm. {remedy}")


def _is_taken_in_folders(name: str) -> bool:
    """Tell whether ImageFolder or VideoFolder would take a column of this name for files."""
    return name in ("image", "video") or name.endswith(("file_name", "file_names"))
