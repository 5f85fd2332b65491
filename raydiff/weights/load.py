"""Fill a module that was built on the meta device from a checkpoint, tensor by tensor, strictly."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import TypeVar

import torch
from torch import Tensor, nn

from raydiff.errors import ModelError
from raydiff.weights.checkpoint import Checkpoint
from raydiff.weights.fp8 import FP8, is_fp8_scale
from raydiff.weights.sources import TensorSource

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    FP8: torch.float8_e4m3fn,
}

MAX_NAMED = 10
"""Tensors that an error names; the rest is a number."""

M = TypeVar("M", bound=nn.Module)


def load_weights(
    module: M,
    checkpoint: Checkpoint,
    component: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> M:
    """Fill `module` (its parameters on the meta device) and return it, in eval mode.

    Tensors are read one by one into the same memory and copied from there to `device` and `dtype`:
    the host never holds more than the largest of them beside the module. No file stays mapped.
    A layer that has a `weight_scale` takes its fp8 weight as it is stored, and its scales in
    float32; other layers take the weight that the two stand for.
    Raises ModelError naming missing, unexpected and mis-shaped tensors.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = checkpoint.tensors(component)
    folded = {
        name: source
        for name, source in tensors.items()
        if name not in wanted and is_fp8_scale(name, tensors)
    }
    tensors = {name: source for name, source in tensors.items() if name not in folded}
    # Weights that were cast to fp8 have no scale: it is 1.
    unscaled = {name for name in wanted if name not in tensors and is_fp8_scale(name, tensors)}
    expected = {name: shape for name, shape in wanted.items() if name not in unscaled}
    _check(expected, checkpoint, component, tensors)
    staging = torch.empty(
        max((source.size_bytes for source in tensors.values()), default=0), dtype=torch.uint8
    )
    scales = {name: stored.float().clone() for name, stored in _stored(folded, staging)}
    for name, stored in _stored(tensors, staging):
        if _is_of_fp8_layer(name, wanted):
            own_dtype = DTYPES[FP8] if name.endswith(".weight") else torch.float32
            tensor = _place(stored, device=device, dtype=own_dtype)
        else:
            scale = scales.get(f"{name}_scale")
            tensor = _place(stored, device=device, dtype=dtype, scale=scale)
        _assign(module, name, tensor)
    for name in unscaled:
        _assign(module, name, torch.ones((), device=device))
    _move_computed_buffers(module, component, device)
    return module.requires_grad_(False).eval()


def _is_of_fp8_layer(name: str, wanted: Mapping[str, object]) -> bool:
    """Whether a tensor is the weight or a scale of a layer that computes in fp8."""
    layer, _, word = name.rpartition(".")
    return f"{layer}.weight_scale" in wanted and word in ("weight", "weight_scale", "input_scale")


def _stored(sources: Mapping[str, TensorSource], staging: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor as it is stored, in `staging`, in the order of the files' bytes."""
    by_file = defaultdict(list)
    for name, source in sources.items():
        by_file[source.file].append((source.offset, name, source))
    for path, entries in by_file.items():
        try:
            with path.open("rb") as file:
                for _, name, source in sorted(entries, key=lambda entry: entry[0]):
                    yield name, _read(file, source, staging)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}; the disk or its mount fails") from None


def _check(
    expected: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    component: str,
    sources: dict[str, TensorSource],
) -> None:
    """Compare the names and shapes that the module has with those that the checkpoint has."""
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in sources]
    unexpected = [
        f"{name} {list(source.shape)}" for name, source in sources.items() if name not in expected
    ]
    misshaped = [
        f"{name} is {list(source.shape)}, expected {list(expected[name])}"
        for name, source in sources.items()
        if name in expected and source.shape != expected[name]
    ]
    unreadable = [
        f"{name} is {source.dtype}"
        for name, source in sources.items()
        if source.dtype not in DTYPES
    ]
    problems = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", misshaped),
        _listed(f"of another dtype than {', '.join(DTYPES)}", unreadable),
    ]
    if any(problems):
        raise ModelError(
            f"{checkpoint.path}: the tensors of {component} are not those of its config. "
            + " ".join(problem for problem in problems if problem)
            + " The files are incomplete or belong to another model: download or copy them again"
        )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{len(names)} {what}: {'; '.join(names[:MAX_NAMED])}{more}."


def _read(file: BufferedReader, source: TensorSource, staging: Tensor) -> Tensor:
    """Read a tensor as it is stored into the beginning of `staging`, and return it in our shape."""
    content = staging[: source.size_bytes]
    file.seek(source.offset)
    count = file.readinto(content.numpy().data) if source.size_bytes else 0
    if count != source.size_bytes:
        raise ModelError(
            f"{source.file}: tensor {source.key!r} ends after {count:,} of {source.size_bytes:,} "
            "bytes; the file changed while it was read"
        )
    tensor = content.view(DTYPES[source.dtype])
    if source.is_transposed:
        return tensor.reshape(source.shape[::-1]).T
    return tensor.reshape(source.shape)


def _place(
    stored: Tensor,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> Tensor:
    """Return a contiguous copy, times `scale`: the next tensor is read over `stored`."""
    if scale is not None:
        return (stored.to(device).float() * scale.to(device)).to(dtype).contiguous()
    if torch.device(device).type == "cpu":
        return stored.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return stored.to(device).to(dtype).contiguous()  # a GPU converts faster than the host


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, leaf, tensor)


def _move_computed_buffers(module: nn.Module, component: str, device: torch.device | str) -> None:
    """Move the buffers that no checkpoint has; they must hold values already."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            raise RuntimeError(
                f"{component}: buffer {name} is on the meta device and in no checkpoint; compute "
                "it in forward, or build it with device='cpu'"
            )
        _assign(module, name, buffer.to(device))
