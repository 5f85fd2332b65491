"""An export as tars for WebDataset."""

import json
from typing import Any, BinaryIO

from raydiff.output.export.rows import Chunk, ExportRows
from raydiff.output.export.targets import ShardLimits, Target
from raydiff.output.rows_file import plain
from raydiff.output.shards.samples import END_OF_TAR, json_bytes, sample_bytes, text_bytes
from raydiff.output.staged_file import StagedFile
from raydiff.output.storage import Storage


class TarTarget(Target):
    """data/train-00000.tar and on: `.png`, `.json` and `.txt` of each sample; for each split a
    list of its shards as `wids` reads it."""

    def __init__(self, dest: Storage, rows: ExportRows, limits: ShardLimits) -> None:
        super().__init__(dest, rows, limits)
        self._shards: dict[str, _Tar] = {}
        self._lists: dict[str, list[dict[str, Any]]] = {split: [] for split in rows.splits}

    def add(self, chunk: Chunk) -> None:
        self.count(chunk)
        for sample, row in zip(chunk.samples, chunk.rows.to_pylist(), strict=True):
            data = sample_bytes(sample.key, sample.ending, sample.data, _texts(row))
            shard = self._shards.get(chunk.split)
            if shard is not None and shard.is_full(len(data), self.limits):
                self._publish(chunk.split)
                shard = None
            if shard is None:
                shard = self._shards[chunk.split] = self._begin(chunk.split)
            shard.append(data)

    def finish(self) -> None:
        for split in list(self._shards):
            self._publish(split)
        for split, shards in self._lists.items():
            values = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
            self.dest.put(f"{split}.json", json.dumps(values, indent=1).encode() + b"\n")

    @property
    def paths(self) -> dict[str, str]:
        return {split: f"data/{split}-*.tar" for split in self.num_samples}

    @property
    def loading(self) -> str:
        split = next(iter(self.paths))
        last = len(self._lists[split]) - 1
        return f'webdataset.WebDataset("data/{split}-{{00000..{last:05d}}}.tar")'

    def _begin(self, split: str) -> "_Tar":
        name = f"data/{split}-{len(self._lists[split]):05d}.tar"
        shard = _Tar(name, self.open.enter_context(StagedFile(self.dest, name)))
        self.open.callback(shard.close)
        return shard

    def _publish(self, split: str) -> None:
        shard = self._shards.pop(split)
        size_bytes = shard.publish()
        self.file_bytes += size_bytes
        entry = {"url": shard.name, "nsamples": shard.num_samples, "filesize": size_bytes}
        self._lists[split].append(entry)


class _Tar:
    """A tar that is being written."""

    def __init__(self, name: str, staged: StagedFile) -> None:
        self.name = name
        self.num_samples = 0
        self._num_bytes = 0
        self._staged = staged
        self._file: BinaryIO = staged.path.open("wb")

    def is_full(self, num_bytes: int, limits: ShardLimits) -> bool:
        """Tell whether another sample of `num_bytes` belongs into the next shard."""
        is_large = self._num_bytes + num_bytes > limits.num_bytes
        return self.num_samples >= limits.num_samples or (self.num_samples > 0 and is_large)

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._num_bytes += len(data)
        self.num_samples += 1

    def close(self) -> None:
        """End the file; it still has its temporary name."""
        self._file.close()

    def publish(self) -> int:
        """Give it its name and return its size."""
        self._file.write(END_OF_TAR)
        self.close()
        return self._staged.publish()


def _texts(row: dict[str, Any]) -> dict[str, bytes]:
    """Return the .json of a row, without its nulls, and the .txt if it has a prompt."""
    known = {name: plain(value) for name, value in row.items() if value is not None}
    texts = {"json": json_bytes(known)}
    if row.get("prompt") is not None:
        texts["txt"] = text_bytes(row["prompt"])
    return texts
