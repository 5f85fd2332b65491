"""What is in a checkpoint: components, tensors, parameters, bytes and dtypes, from headers only."""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raydiff.errors import ModelError
from raydiff.weights.checkpoint import open_checkpoint
from raydiff.weights.headers import TensorHeader, read_header, refuse_pickle
from raydiff.weights.single_file import detect_family, split_file
from raydiff.weights.sources import TensorSource

Layout = Literal["folder", "single file", "tensors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentReport:
    """The tensors of one component, as they are loaded."""

    name: str
    num_tensors: int
    num_parameters: int
    size_bytes: int
    dtypes: dict[str, int]
    """Tensors of each dtype, the commonest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectReport:
    """What is in a checkpoint."""

    path: str
    layout: Layout
    """`tensors` is a bare component folder or any .safetensors file."""
    family: str | None
    components: tuple[ComponentReport, ...]
    skipped: dict[str, str]
    """Tensors that are not loaded, on purpose: {name: reason}."""


def inspect_path(path: str | Path) -> InspectReport:
    """Describe a pipeline folder, an original single file, a component folder or any tensor file.

    Counts are of tensors as loaded: a fused projection of an original file is three.
    Raises ModelError for files that are broken, pickled or not there.
    """
    path = Path(path).expanduser()
    refuse_pickle(path)
    if (path / "model_index.json").is_file():
        checkpoint = open_checkpoint(path)
        return InspectReport(
            path=str(path),
            layout="folder",
            family=checkpoint.family,
            components=tuple(
                _component(name, checkpoint.tensors(name).values())
                for name in checkpoint.components
            ),
            skipped=dict(checkpoint.skipped),
        )
    if path.is_dir():
        return _bare(path, _weight_files(path))
    header = read_header(path)
    return _bare(path, [path]) if detect_family(header) is None else _single_file(path, header)


def _single_file(path: Path, header: dict[str, TensorHeader]) -> InspectReport:
    split = split_file(path)
    components = [
        _component(name, sources.values()) for name, sources in split.components.items() if sources
    ]
    if split.unknown:
        components.append(_component("unknown", [header[name] for name in split.unknown]))
    return InspectReport(
        path=str(path),
        layout="single file",
        family=split.family,
        components=tuple(components),
        skipped=split.skipped,
    )


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder}: no model_index.json and no .safetensors file; name a pipeline folder, one "
            "of its component folders, or a .safetensors file"
        )
    return files


def _bare(path: Path, files: list[Path]) -> InspectReport:
    """Report each file by itself: a component folder can hold the same weights twice."""
    return InspectReport(
        path=str(path),
        layout="tensors",
        family=None,
        components=tuple(_component(file.name, read_header(file).values()) for file in files),
        skipped={},
    )


def _component(
    name: str, tensors: Collection[TensorSource] | Collection[TensorHeader]
) -> ComponentReport:
    return ComponentReport(
        name=name,
        num_tensors=len(tensors),
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        dtypes=dict(Counter(tensor.dtype for tensor in tensors).most_common()),
    )
