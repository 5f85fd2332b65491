"""Write a .safetensors file tensor by tensor; only the one being written is in memory."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from raydiff.weights.headers import DTYPE_BITS

Buffer = bytes | memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """A tensor to be written."""

    dtype: str
    """safetensors' own name: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_tensors(
    path: Path,
    tensors: Mapping[str, TensorPlan],
    metadata: Mapping[str, str],
    chunks: Iterable[Buffer],
) -> None:
    """Write `tensors` in their order; `chunks` gives their bytes one after another.

    Readers that map the file want each tensor at a multiple of its item size: an order by falling
    item size gives that. Raises OutputError when the disk refuses.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.size_bytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks:
            written += file.write(chunk)
    if written != end:
        raise RuntimeError(f"{path}: {end} bytes were promised and {written} given")
