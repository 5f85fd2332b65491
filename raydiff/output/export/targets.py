"""What every format of an export has in common: samples go in, whole files come out.

Nothing in a row but its request_id and the name of its split, letters and digits, gets into a name.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import pyarrow as pa

from raydiff.output.export.rows import Chunk, ExportRows
from raydiff.output.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLimits:
    """A shard is closed at whichever comes first."""

    num_samples: int
    """Of a tar; the rows of a Parquet file are not limited."""
    num_bytes: int
    """Of images; one image may exceed it."""


class Target(ABC):
    """Takes chunks in any order of their splits; `finish` closes what is open."""

    def __init__(self, dest: Storage, rows: ExportRows, limits: ShardLimits) -> None:
        self.dest = dest
        self.limits = limits
        self.schema = rows.schema
        self.num_samples: Counter[str] = Counter()
        """By split."""
        self.num_bytes: Counter[str] = Counter()
        """Of images, by split."""
        self.file_bytes = 0
        """Of the files published so far."""
        self.open = ExitStack()

    @abstractmethod
    def add(self, chunk: Chunk) -> None:
        """Write a chunk. Raises OSError."""

    @abstractmethod
    def finish(self) -> None:
        """Publish every file that is still being written. Raises OSError."""

    def count(self, chunk: Chunk) -> None:
        """Add a chunk to what the dataset card says."""
        self.num_samples[chunk.split] += len(chunk.samples)
        self.num_bytes[chunk.split] += sum(len(one.data) for one in chunk.samples)

    @property
    @abstractmethod
    def paths(self) -> dict[str, str]:
        """A pattern for the files of each split that has some."""

    @property
    @abstractmethod
    def loading(self) -> str:
        """A line of Python that loads the dataset."""

    @property
    def card_schema(self) -> pa.Schema | None:
        """The columns that `datasets` finds; None where it finds them out itself."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()


def free_names(names: Collection[str], is_taken: Callable[[str], bool]) -> dict[str, str]:
    """Return a name for each column that the format does not use itself: `image` becomes
    `image_`."""
    free: dict[str, str] = {}
    for name in names:
        new = name
        while is_taken(new) or (new != name and new in names):
            new += "_"
        free[name] = new
    return free
