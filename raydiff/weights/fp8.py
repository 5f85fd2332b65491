"""fp8 in checkpoints: which layers have it is read from the tensors' dtypes, and their scales from
the tensors beside them, whatever they are called there. A weight is its fp8 value times its scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from raydiff.errors import ModelError
from raydiff.weights.sources import TensorSource

FP8 = "F8_E4M3"
"""safetensors' name of torch.float8_e4m3fn, the dtype of fp8 weights."""

PACKED = ("U8", "I8", "F4")
"""Dtypes of weights in NVFP4 and int8 files."""

SPELLINGS = {
    "weight_scale": "weight_scale",
    "input_scale": "input_scale",
    # ComfyUI's older files.
    "scale_weight": "weight_scale",
    "scale_input": "input_scale",
}
"""What the last word of a scale's name may be, and ours for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Layer:
    """How a linear layer's fp8 weight is scaled."""

    has_row_scales: bool
    """One scale for each output, not one for the whole weight."""
    has_input_scale: bool
    """The scale of the layer's input is in the file, measured beforehand."""


def with_standard_scales(sources: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Return a component's tensors with the scales of its fp8 weights under our names and shapes.

    A scale has the shape () for a whole tensor and (rows, 1) for each row. Raises ModelError for a
    scale of another shape: scales of blocks are not read.
    """
    result = {}
    for name, source in sources.items():
        stem, _, word = name.rpartition(".")
        weight = sources.get(f"{stem}.weight")
        if word in SPELLINGS and weight is not None and weight.dtype == FP8:
            shape = _scale_shape(source, weight, SPELLINGS[word])
            result[f"{stem}.{SPELLINGS[word]}"] = replace(source, shape=shape)
        else:
            result[name] = source
    return result


def fp8_layers(sources: Mapping[str, TensorSource]) -> dict[str, Fp8Layer]:
    """Return {layer: its scales} of a component's fp8 weights, of matrices alone."""
    layers = {}
    for name, source in sources.items():
        if source.dtype == FP8 and name.endswith(".weight") and len(source.shape) == 2:
            layer = name.removesuffix(".weight")
            scale = sources.get(f"{layer}.weight_scale")
            layers[layer] = Fp8Layer(
                has_row_scales=scale is not None and scale.shape != (),
                has_input_scale=f"{layer}.input_scale" in sources,
            )
    return layers


def refuse_other_quantisation(path: Path, sources: Mapping[str, TensorSource]) -> None:
    """Raise ModelError for a file whose weights are in another quantised format than fp8."""
    packed = [name for name, s in sources.items() if name.endswith(".weight") and s.dtype in PACKED]
    if packed:
        raise ModelError(
            f"{path}: {len(packed)} weights are {sources[packed[0]].dtype} (NVFP4 or int8); "
            "raydiff reads bf16 and fp8. Use one of those files"
        )


def is_fp8_scale(name: str, sources: Mapping[str, TensorSource]) -> bool:
    """Whether a tensor is a scale of an fp8 weight among `sources`."""
    stem, _, word = name.rpartition(".")
    weight = sources.get(f"{stem}.weight")
    return word in ("weight_scale", "input_scale") and weight is not None and weight.dtype == FP8


def _scale_shape(source: TensorSource, weight: TensorSource, word: str) -> tuple[int, ...]:
    if source.shape in ((), (1,), (1, 1)):
        return ()
    num_rows = weight.shape[0] if weight.shape else 0
    if word == "weight_scale" and source.shape in ((num_rows,), (num_rows, 1)):
        return (num_rows, 1)
    raise ModelError(
        f"{source.file}: {source.key} has shape {list(source.shape)}; raydiff reads fp8 weights "
        f"with one scale, or with one for each of the {num_rows} rows. "
        "Use another fp8 file, or the bf16 one and `raydiff models quantize`"
    )
