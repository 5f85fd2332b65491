"""Where each tensor of a component is: which file, which bytes, under our name."""

from dataclasses import dataclass
from pathlib import Path

from raydiff.errors import ModelError
from raydiff.weights.headers import TensorHeader
from raydiff.weights.keymaps.rules import To


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSource:
    """One tensor of ours: `size_bytes` bytes of `file` from `offset` on."""

    file: Path
    key: str
    """The tensor's name in the file."""
    dtype: str
    shape: tuple[int, ...]
    """Our shape; where `is_transposed`, the file has it reversed."""
    size_bytes: int
    offset: int
    is_transposed: bool = False


def tensor_sources(file: Path, key: str, header: TensorHeader, to: To) -> dict[str, TensorSource]:
    """Return {our name: source} for one tensor of a file: three of them for a fused projection."""
    shape, size_bytes = header.shape, header.size_bytes
    if to.reshape == "linear":
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
    if to.reshape == "transpose":
        shape = shape[::-1]
    if to.reshape == "thirds":
        if not shape or shape[0] % 3:
            raise ModelError(
                f"{file}: {key} has shape {list(shape)}; a fused query, key and value projection "
                "has three times as many rows as the encoder is wide"
            )
        shape, size_bytes = (shape[0] // 3, *shape[1:]), size_bytes // 3
    return {
        name: TensorSource(
            file=file,
            key=key,
            dtype=header.dtype,
            shape=shape,
            size_bytes=size_bytes,
            offset=header.offset + index * size_bytes,
            is_transposed=to.reshape == "transpose",
        )
        for index, name in enumerate(to.names)
    }
