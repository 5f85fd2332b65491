"""Make an fp8 checkpoint of LTX-2 from a bf16 one: the layers of its blocks that the picture's
tokens go through.

Those of the sound and of texts stay as they are: with a hundred tokens for the picture's thousands
they are no faster in fp8, and they make half of the error. The first and last blocks stay too, as
in Lightricks' own fp8 files: errors there cost most.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydiff.errors import ModelError, OutputError
from raydiff.models.fp8_linear import fp8_linear, is_aligned, scale_for, to_fp8
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.weights.checkpoint import Checkpoint, list_files, open_checkpoint
from raydiff.weights.folder import read_json
from raydiff.weights.fp8 import FP8
from raydiff.weights.headers import DTYPE_BITS, TensorHeader, read_header, read_metadata
from raydiff.weights.load import DTYPES
from raydiff.weights.sources import TensorSource
from raydiff.weights.write import Buffer, TensorPlan, write_tensors

ScaleKind = Literal["rowwise", "tensorwise"]

OnProgress = Callable[[int, int], None]

LINEARS = re.compile(
    r"transformer_blocks\.(?P<block>\d+)\."
    r"(attn1\.(to_[qkv]|fused|to_out\.0)|(attn2|audio_to_video_attn)\.(to_q|to_out\.0)"
    r"|video_to_audio_attn\.(to_[kv]|fused)|ff\.net\.(0\.proj|2))"
)
"""`fused` is what a loaded transformer has of some of the others. The gates of 2.3's heads are left
out: they are small, and every value of a head hangs on one."""

KEPT_SHARE = 24
"""One block of so many is kept at each end: 2 of 48."""

COPY_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeReport:
    """What was made."""

    num_layers: int
    """Linear layers in fp8."""
    size_bytes: int
    """Of the transformer's tensors, before."""
    fp8_size_bytes: int
    """And after, with their scales."""


def quantize(
    source: Path,
    target: Path,
    *,
    scales: ScaleKind = "rowwise",
    on_progress: OnProgress | None = None,
) -> QuantizeReport:
    """Write an fp8 copy of a pipeline folder or an original single file; both are LTX-2's.

    Memory: one tensor, in float32. Files without fp8 tensors are hard-linked where the disk can.
    `on_progress` is called with the bytes of changed files read so far, and all there are.
    Raises ModelError for a source that cannot be quantised, OutputError for a target that exists or
    cannot be written; nothing is left behind then.
    """
    checkpoint = open_checkpoint(source)
    layers = layers_to_quantize(checkpoint)
    progress = _Progress({layer.file for layer in layers.values()}, on_progress)
    with _staged(target) as staging:
        if source.is_dir():
            _write_folder(source, staging, layers, scales, progress)
        else:
            _quantize_file(source, staging, _keys(layers, source), scales, progress)
    before = sum(tensor.size_bytes for tensor in checkpoint.tensors("transformer").values())
    after = open_checkpoint(target).tensors("transformer").values()
    return QuantizeReport(
        num_layers=len(layers),
        size_bytes=before,
        fp8_size_bytes=sum(tensor.size_bytes for tensor in after),
    )


def layers_to_quantize(checkpoint: Checkpoint) -> dict[str, TensorSource]:
    """Return {our name: weight} of the layers that go to fp8; ModelError where there are none."""
    if checkpoint.family != "ltx2":
        raise ModelError(
            f"{checkpoint.path}: this is {checkpoint.family}; raydiff quantises LTX-2's transformer"
        )
    tensors = checkpoint.tensors("transformer")
    if any(tensor.dtype == FP8 for tensor in tensors.values()):
        raise ModelError(f"{checkpoint.path}: is in fp8 already; quantise the bf16 checkpoint")
    weights = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    }
    chosen = _chosen({name: tensor.shape for name, tensor in weights.items()})
    if not chosen:
        raise ModelError(f"{checkpoint.path}: its transformer has no layer that fits fp8")
    return {f"{name}.weight": weights[name] for name in chosen}


def quantize_blocks(transformer: LTX2Transformer) -> int:
    """Put the same layers of a transformer that is loaded, and prepared for inference, into fp8
    where they are, with a scale for each output; return how many layers those are."""
    linears = {
        name: module for name, module in transformer.named_modules() if type(module) is nn.Linear
    }
    chosen = _chosen({name: linear.weight.shape for name, linear in linears.items()})
    for name in chosen:
        linear = linears.pop(name)
        weight, scale = quantized(linear.weight, "rowwise")
        tensors = {"weight": weight, "weight_scale": scale}
        if linear.bias is not None:
            tensors["bias"] = linear.bias.detach()
        owner, _, leaf = name.rpartition(".")
        transformer.get_submodule(owner)._modules[leaf] = fp8_linear(tensors)
    return len(chosen)


def _chosen(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the layers that go to fp8, given the shapes of layers' weights."""
    blocks = {
        name: int(match["block"])
        for name in shapes
        if (match := LINEARS.fullmatch(name)) is not None
    }
    num_blocks = max(blocks.values(), default=-1) + 1
    kept = num_blocks // KEPT_SHARE
    return [
        name
        for name, block in blocks.items()
        if kept <= block < num_blocks - kept and is_aligned(shapes[name])
    ]


class _Progress:
    def __init__(self, files: Collection[Path], on_progress: OnProgress | None) -> None:
        self.num_bytes = 0
        self.total_bytes = sum(
            tensor.size_bytes for file in files for tensor in read_header(file).values()
        )
        self.on_progress = on_progress

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.on_progress is not None:
            self.on_progress(self.num_bytes, self.total_bytes)


def _write_folder(
    source: Path,
    target: Path,
    layers: dict[str, TensorSource],
    scales: ScaleKind,
    progress: "_Progress",
) -> None:
    changed = {layer.file for layer in layers.values()}
    for name in list_files(source, variant="auto", dtype="auto").names:
        path, copy = source / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path in changed:
            _quantize_file(path, copy, _keys(layers, path), scales, progress)
        elif path.suffix == ".safetensors":
            _link(path, copy)
        elif name.startswith("transformer/") and ".safetensors.index" in name:
            index = _with_scales(read_json(path), layers, scales)
            copy.write_text(json.dumps(index, indent=2), encoding="utf-8")
        else:
            shutil.copyfile(path, copy)


def _link(path: Path, copy: Path) -> None:
    try:
        copy.hardlink_to(path.resolve())  # the Hub's cache has symbolic links
    except OSError:
        shutil.copyfile(path, copy)


def _with_scales(
    index: dict[str, Any], layers: dict[str, TensorSource], scales: ScaleKind
) -> dict[str, Any]:
    """The index of shards, with each layer's scale in the shard of its weight."""
    shards, saved_bytes = dict(index["weight_map"]), 0
    for layer in layers.values():
        scale = _scale_plan(layer.shape, scales)
        shards[_scale_key(layer.key)] = shards[layer.key]
        saved_bytes += layer.size_bytes - _fp8_plan(layer.shape).size_bytes - scale.size_bytes
    metadata = dict(index.get("metadata") or {})
    if "total_size" in metadata:
        metadata["total_size"] -= saved_bytes
    return {"metadata": metadata, "weight_map": dict(sorted(shards.items()))}


def _keys(layers: dict[str, TensorSource], path: Path) -> set[str]:
    """The layers' weights in one file, by their names there."""
    return {layer.key for layer in layers.values() if layer.file == path}


def _scale_key(weight_key: str) -> str:
    return f"{weight_key}_scale"


def _fp8_plan(shape: tuple[int, ...]) -> TensorPlan:
    return TensorPlan(dtype=FP8, shape=shape)


def _scale_plan(shape: tuple[int, ...], scales: ScaleKind) -> TensorPlan:
    return TensorPlan(dtype="F32", shape=(shape[0], 1) if scales == "rowwise" else ())


def _quantize_file(
    path: Path, copy: Path, keys: set[str], scales: ScaleKind, progress: "_Progress"
) -> None:
    """Write `copy` with the weights `keys` in fp8, then their scales, and all else as it was."""
    header = read_header(path)
    kept = sorted(header.keys() - keys, key=lambda key: -DTYPE_BITS[header[key].dtype])
    weights = sorted(keys)
    plans = {key: TensorPlan(dtype=header[key].dtype, shape=header[key].shape) for key in kept}
    plans |= {key: _fp8_plan(header[key].shape) for key in weights}
    plans |= {_scale_key(key): _scale_plan(header[key].shape, scales) for key in weights}
    layers = {key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in weights}
    metadata = read_metadata(path) | {
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})
    }

    def contents(file: BufferedReader) -> Iterator[Buffer]:
        for key in kept:
            yield from _raw(file, header[key])
            progress.add(header[key].size_bytes)
        found = []
        for key in weights:
            weight, scale = quantized(_read(file, header[key]), scales)
            yield _bytes(weight)
            found.append(scale)
            progress.add(header[key].size_bytes)
        for scale in found:
            yield _bytes(scale)

    with path.open("rb") as file:
        write_tensors(copy, plans, metadata, contents(file))


def quantized(weight: Tensor, scales: ScaleKind) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) in fp8, and its scale: (rows, 1) or ()."""
    sizes = weight.abs()
    scale = scale_for(sizes.amax(dim=1, keepdim=True) if scales == "rowwise" else sizes.amax())
    return to_fp8(weight, scale), scale


def _raw(file: BufferedReader, tensor: TensorHeader) -> Iterator[bytes]:
    file.seek(tensor.offset)
    rest = tensor.size_bytes
    while rest:
        chunk = file.read(min(rest, COPY_BYTES))
        if not chunk:
            raise ModelError(
                f"{file.name}: ends {rest:,} bytes early; it changed while it was read"
            )
        rest -= len(chunk)
        yield chunk


def _read(file: BufferedReader, tensor: TensorHeader) -> Tensor:
    content = bytearray().join(_raw(file, tensor))
    return torch.frombuffer(content, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


def _bytes(tensor: Tensor) -> Buffer:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Give a path to write to: it becomes `target` when all has gone well, and is gone if not."""
    if target.exists():
        raise OutputError(f"{target}: exists already; name another, or remove it")
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        staging.rename(target)
    except OSError as error:
        raise OutputError(
            f"{target}: could not be made: {error.filename or staging}: {error.strerror}"
        ) from None
    finally:
        if staging.is_dir():
            shutil.rmtree(staging)
        elif staging.exists():
            staging.unlink()
