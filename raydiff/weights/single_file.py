"""Original single files of SD 2.1, SDXL and LTX-2: which family, which tensor belongs to which
component, and what an SD network predicts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from raydiff.errors import ModelError
from raydiff.weights.fp8 import with_standard_scales
from raydiff.weights.headers import read_header, read_metadata
from raydiff.weights.keymaps import ltx2
from raydiff.weights.keymaps.clip import OPEN_CLIP, TRANSFORMERS_CLIP
from raydiff.weights.keymaps.rules import KeyMap, To, rename
from raydiff.weights.keymaps.skipped import SKIPPED_IN_SINGLE_FILES
from raydiff.weights.keymaps.unet import UNET
from raydiff.weights.keymaps.vae import VAE
from raydiff.weights.published import PredictionType
from raydiff.weights.sources import TensorSource, tensor_sources

PREFIXES: dict[str, dict[str, tuple[str, KeyMap]]] = {
    "sd21": {
        "model.diffusion_model.": ("unet", UNET),
        "first_stage_model.": ("vae", VAE),
        "cond_stage_model.model.": ("text_encoder", OPEN_CLIP),
    },
    "sdxl": {
        "model.diffusion_model.": ("unet", UNET),
        "first_stage_model.": ("vae", VAE),
        "conditioner.embedders.0.": ("text_encoder", TRANSFORMERS_CLIP),
        "conditioner.embedders.1.model.": ("text_encoder_2", OPEN_CLIP),
    },
    "ltx2": {
        "model.diffusion_model.video_embeddings_connector.": ("connectors", ltx2.VIDEO_CONNECTOR),
        "model.diffusion_model.audio_embeddings_connector.": ("connectors", ltx2.AUDIO_CONNECTOR),
        "model.diffusion_model.": ("transformer", ltx2.TRANSFORMER),
        "text_embedding_projection.": ("connectors", ltx2.TEXT_PROJECTIONS),
        "vae.": ("vae", ltx2.VIDEO_VAE),
        "audio_vae.": ("audio_vae", ltx2.AUDIO_VAE),
        "vocoder.": ("vocoder", ltx2.VOCODER),
    },
}
"""Where each component's tensors stand in a file of the family, and the table that renames them.
The first line that a name begins with is its own."""

UNSUPPORTED = {
    "cond_stage_model.transformer.": "Stable Diffusion 1.x",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "FLUX",
    "double_blocks.": "FLUX",
    "control_model.": "a ControlNet",
    "lora_unet_": "a LoRA",
}
"""Beginning of a tensor's name that tells what else a file is."""

MODELSPEC_PREDICTION: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "vpred": "v_prediction",
}
"""Values of the `modelspec.prediction_type` metadata (github.com/Stability-AI/ModelSpec)."""

MODELSPEC_ARCHITECTURE: dict[str, PredictionType] = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFile:
    """The tensors of a single file by component, under our names."""

    family: str
    components: dict[str, dict[str, TensorSource]]
    skipped: dict[str, str] = field(default_factory=dict)
    """Tensors left out on purpose: {name in the file: reason}."""
    unknown: tuple[str, ...] = ()
    """Tensors that no table knows."""


def detect_family(names: Iterable[str]) -> str | None:
    """Return `sdxl`, `sd21`, `ltx2` or None from the tensor names of a file."""
    names = list(names)
    if any(name.startswith("model.diffusion_model.av_ca_") for name in names):
        return "ltx2"
    if any(name.startswith("conditioner.embedders.1.model.") for name in names):
        return "sdxl"
    if any(name.startswith("cond_stage_model.model.") for name in names):
        return "sd21"
    return None


def split_file(path: Path) -> SplitFile:
    """Read the header of a single file and sort its tensors by component.

    Raises ModelError for a file that is broken or of no known family.
    """
    header = read_header(path)
    family = detect_family(header)
    if family is None:
        raise ModelError(
            f"{path}: {_what_it_is(header)}; raydiff reads SD 2.1, SDXL base and LTX-2 files"
        )
    components: dict[str, dict[str, TensorSource]] = {
        component: {} for component, _ in PREFIXES[family].values()
    }
    skipped, unknown = {}, []
    for key, tensor in header.items():
        reason = skip_reason(key, SKIPPED_IN_SINGLE_FILES)
        component, to = _rename(family, key)
        if reason is not None:
            skipped[key] = reason
        elif to is None:
            unknown.append(key)
        else:
            components[component] |= tensor_sources(path, key, tensor, to)
    return SplitFile(
        family=family,
        components={name: with_standard_scales(sources) for name, sources in components.items()},
        skipped=skipped,
        unknown=tuple(unknown),
    )


def skip_reason(name: str, table: dict[str, str]) -> str | None:
    """Return why a tensor is left out, or None for one that is not."""
    for pattern, reason in table.items():
        if re.fullmatch(pattern, name):
            return reason
    return None


def prediction_type(path: Path, family: str, skipped: Iterable[str]) -> PredictionType:
    """Return what the UNet of a single file predicts, which its weights alone do not show.

    The first that speaks decides: a `.yaml` of the same name beside the file (the original's
    config, `model.params.parameterization`), the file's modelspec metadata, a `v_pred` tensor.
    Else SD 2.1 is taken for the 768 model (v_prediction), and SDXL for epsilon.
    """
    sidecar = sidecar_file(path)
    if sidecar is not None:
        return _parameterization(sidecar)
    metadata = read_metadata(path)
    prediction = MODELSPEC_PREDICTION.get(metadata.get("modelspec.prediction_type", "").lower())
    architecture = metadata.get("modelspec.architecture", "").lower()
    prediction = prediction or MODELSPEC_ARCHITECTURE.get(architecture)
    if prediction is not None:
        return prediction
    return "v_prediction" if family == "sd21" or "v_pred" in skipped else "epsilon"


def sidecar_file(path: Path) -> Path | None:
    """Return the original's config beside a single file, or None."""
    sidecar = path.with_suffix(".yaml")
    return sidecar if sidecar.is_file() else None


def _parameterization(sidecar: Path) -> PredictionType:
    try:
        value = yaml.safe_load(sidecar.read_text(encoding="utf-8"))
        # The original's code takes eps for a config that does not say.
        value = value["model"]["params"].get("parameterization", "eps")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{sidecar}: expected the original's config, with model.params.parameterization "
            "(v or eps); correct the file or move it away"
        ) from None
    if value not in ("v", "eps"):
        raise ModelError(f"{sidecar}: parameterization is {value!r}; known are v and eps")
    return "v_prediction" if value == "v" else "epsilon"


def _rename(family: str, key: str) -> tuple[str, To | None]:
    for prefix, (component, keymap) in PREFIXES[family].items():
        if key.startswith(prefix):
            return component, rename(keymap, key.removeprefix(prefix))
    return "", None


def _what_it_is(names: Iterable[str]) -> str:
    names = list(names)
    for prefix, what in UNSUPPORTED.items():
        if any(name.startswith(prefix) for name in names):
            return f"its tensor names are those of {what}"
    return f"its {len(names)} tensors are of no known checkpoint ({', '.join(names[:3])}, ...)"
