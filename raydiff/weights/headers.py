"""The header of a .safetensors file: its tensors' names, dtypes, shapes and places, without torch.

Layout (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian,
then the header in JSON, then the tensors' bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff.errors import ModelError

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
}

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger length means that the file is not safetensors."""

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """What a file says of one tensor."""

    dtype: str
    """safetensors' own name: F16, BF16, F32, ..."""
    shape: tuple[int, ...]
    size_bytes: int
    offset: int
    """Where the tensor's first byte is in the file."""


def read_header(path: str | Path) -> dict[str, TensorHeader]:
    """Return the tensors of a .safetensors file in the order of their bytes.

    Raises ModelError for a file that is missing, pickled, truncated or not safetensors.
    """
    path = Path(path)
    header, start, size_bytes = _read_json(path)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, entry, start)
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].offset))
    end = start
    for name, tensor in tensors.items():
        if tensor.offset != end:
            raise _broken(path, f"tensor {name!r} starts at byte {tensor.offset}, expected {end}")
        end = tensor.offset + tensor.size_bytes
    if end != size_bytes:
        raise _broken(path, f"its header promises {end:,} bytes, found {size_bytes:,}")
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the free-text metadata of a .safetensors file (`__metadata__`), often empty."""
    header, _, _ = _read_json(Path(path))
    metadata = header.get("__metadata__") or {}
    return {str(key): str(value) for key, value in metadata.items()}


def refuse_pickle(path: str | Path) -> None:
    """Raise ModelError for a pickle file: opening one runs whatever code it carries."""
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(
            f"{path}: refused, a {path.suffix} file is a pickle and can run code when opened. Use "
            "the checkpoint's .safetensors file, or convert this one where you trust it: "
            "torch.load(path, weights_only=True), then safetensors.torch.save_file"
        )


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, the byte at which tensors start, and the file's size."""
    refuse_pickle(path)
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size_bytes < 8:
                raise _broken(path, f"expected at least 8 bytes, found {size_bytes}")
            if length > MAX_HEADER_BYTES:
                raise _broken(
                    path, "its first 8 bytes are no header length; not a safetensors file"
                )
            if 8 + length > size_bytes:
                raise _broken(
                    path, f"its header alone needs {8 + length:,} bytes, found {size_bytes:,}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; check the path and its permissions") from None
    except (ValueError, RecursionError):
        raise _broken(path, "its header is not JSON; not a safetensors file") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object; not a safetensors file")
    return header, 8 + length, size_bytes


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorHeader:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        is_sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"tensor {name!r} lacks dtype, shape or data_offsets") from None
    if not is_sound or not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"tensor {name!r} has dtype {dtype!r} and shape {list(shape)}")
    size_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != size_bytes:
        raise _broken(
            path,
            f"tensor {name!r} is {dtype} {list(shape)}: {size_bytes:,} bytes, not {end - begin:,}",
        )
    return TensorHeader(dtype=dtype, shape=shape, size_bytes=size_bytes, offset=start + begin)


def _broken(path: Path, problem: str) -> ModelError:
    return ModelError(
        f"{path}: {problem}. The file is truncated or damaged: "
        "delete it and download or copy it again"
    )
