"""Which files of a diffusers folder are used: exactly one weight format per component, from
model_index.json and the list of file names alone, so that the Hub is asked for nothing else."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raydiff.errors import ModelError
from raydiff.weights.components import Needed
from raydiff.weights.headers import PICKLE_SUFFIXES

Variant = Literal["auto", "fp16", "none"]
ReadJson = Callable[[str], dict[str, Any]]

WEIGHTED_COMPONENTS = (
    "text_encoder",
    "text_encoder_2",
    "unet",
    "connectors",
    "transformer",
    "refine_transformer",
    "vae",
    "audio_vae",
    "vocoder",
    "latent_upsampler",
)

UNLISTED_COMPONENTS = ("latent_upsampler", "refine_transformer")
"""Components of a second pipeline that shares the folder: its model_index.json does not list
them. A refine_transformer is the transformer of two-stage clips' second stage, where that is
another one: the distilled."""

WEIGHT_STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}
"""Beginning of the weight files' names, by the library that model_index.json names."""

SMALL_SUFFIXES = (".json", ".txt")
"""Tokenizers and configs; anything else in their folders is not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderFiles:
    """The files of one checkpoint folder, relative to it, `/` separated."""

    model_index: dict[str, Any]
    weights: dict[str, tuple[str, ...]]
    """The .safetensors files of each component."""
    small: tuple[str, ...]
    """model_index.json, scheduler, tokenizers, configs and shard indexes."""

    @property
    def names(self) -> tuple[str, ...]:
        """All files, sorted."""
        weights = (name for names in self.weights.values() for name in names)
        return tuple(sorted({*self.small, *weights}))


def choose_files(
    folder: str,
    names: Collection[str],
    read_json: ReadJson,
    *,
    variant: Variant,
    dtype: str,
    needed: Needed | None = None,
) -> FolderFiles:
    """Choose among the files `names` of a folder or Hub repository called `folder`.

    variant auto prefers fp16 files unless dtype is float32, and takes what is there otherwise;
    fp16 asks for at least one component in fp16; none takes no fp16 file. Of components that are
    not `needed` no weights are chosen, nor looked for.
    Raises ModelError for a component without config or safetensors weights.
    """
    if "model_index.json" not in names:
        raise ModelError(
            f"{folder}: no model_index.json; expected a pipeline folder in diffusers layout, "
            "or the path of one .safetensors file"
        )
    model_index = read_json("model_index.json")
    libraries = {name: _library(model_index.get(name)) for name in WEIGHTED_COMPONENTS}
    for name in UNLISTED_COMPONENTS:
        if f"{name}/config.json" in names:
            libraries[name] = "diffusers"
    present = {name: library for name, library in libraries.items() if library is not None}
    chosen = set(present if needed is None else needed(present))
    small = {"model_index.json"}
    weights: dict[str, tuple[str, ...]] = {}
    for component, library in present.items():
        small.add(_config_file(folder, component, names))
        weights[component] = ()
        if component in chosen:
            stem = WEIGHT_STEMS.get(library, WEIGHT_STEMS["diffusers"])
            weights[component], index = component_weights(
                folder, component, stem, names, read_json, _suffixes(variant, dtype)
            )
            small |= set(index)
    small |= _small_folder(folder, "scheduler", names)
    for component in weights:
        if component.startswith("text_encoder"):
            small |= _small_folder(folder, component.replace("text_encoder", "tokenizer"), names)
    # A component that is not needed may be the one in fp16.
    candidates = names if needed else [name for files in weights.values() for name in files]
    if variant == "fp16" and not any(".fp16" in name for name in candidates):
        raise ModelError(
            f"{folder}: has no fp16 weight files; leave model.variant at auto to use those it has"
        )
    return FolderFiles(model_index=model_index, weights=weights, small=tuple(sorted(small)))


def list_names(folder: Path) -> set[str]:
    """Return the files of a local folder and its folders, relative to it, `/` separated."""
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in paths}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ModelError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; copy or download the folder again") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not valid JSON; copy or download the folder again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _library(entry: Any) -> str | None:
    """Return the library of a model_index.json entry, None for [null, null] or no entry."""
    return str(entry[0]) if isinstance(entry, list) and entry and entry[0] is not None else None


def _suffixes(variant: Variant, dtype: str) -> tuple[str, ...]:
    """Return the variants in the order of preference, as they stand in file names."""
    if variant == "none":
        return ("",)
    return ("", ".fp16") if variant == "auto" and dtype == "float32" else (".fp16", "")


def _config_file(folder: str, component: str, names: Collection[str]) -> str:
    name = f"{component}/config.json"
    if name not in names:
        raise ModelError(
            f"{folder}: model_index.json lists {component}, but {name} is missing; "
            "copy or download the folder again"
        )
    return name


def component_weights(
    folder: str,
    component: str,
    stem: str,
    names: Collection[str],
    read_json: ReadJson,
    suffixes: tuple[str, ...] = ("",),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the component's weight files, and the index that lists them if they are shards."""
    for suffix in suffixes:
        single = f"{component}/{stem}{suffix}.safetensors"
        if single in names:
            return (single,), ()
        # The second spelling is the one that older diffusers wrote.
        for index_suffix in (f".index{suffix}.json", f"{suffix}.index.json"):
            index = f"{component}/{stem}.safetensors{index_suffix}"
            if index in names:
                return _shards(folder, component, index, names, read_json), (index,)
    raise ModelError(f"{folder}: {_what_is_missing(component, stem, names, suffixes)}")


def _shards(
    folder: str, component: str, index: str, names: Collection[str], read_json: ReadJson
) -> tuple[str, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder}: {index} has no weight_map; copy or download the folder again")
    shards = sorted({f"{component}/{shard}" for shard in weight_map.values()})
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise ModelError(
            f"{folder}: {index} lists {len(shards)} shards, {', '.join(missing[:10])} missing; "
            "copy or download the folder again"
        )
    return tuple(shards)


def _what_is_missing(
    component: str, stem: str, names: Collection[str], suffixes: tuple[str, ...]
) -> str:
    there = sorted(name for name in names if name.startswith(f"{component}/"))
    pickles = [name for name in there if name.endswith(PICKLE_SUFFIXES)]
    if any(name.endswith(".safetensors") and ".fp16" in name for name in there) and suffixes == (
        "",
    ):
        return f"{component} has fp16 weights only; set model.variant to auto or fp16"
    if pickles:
        return (
            f"{component} has only pickle weights ({', '.join(pickles[:3])}), which are refused: "
            "they can run code when opened. Convert them where you trust them: torch.load(path, "
            f"weights_only=True), then safetensors.torch.save_file to {stem}.safetensors"
        )
    return (
        f"{component}/{stem}.safetensors is missing (found: {', '.join(there) or 'nothing'}); "
        "copy or download the folder again"
    )


def _small_folder(folder: str, name: str, names: Collection[str]) -> set[str]:
    files = {
        file
        for file in names
        if file.startswith(f"{name}/") and file.count("/") == 1 and file.endswith(SMALL_SUFFIXES)
    }
    if not files:
        raise ModelError(
            f"{folder}: the folder {name}/ is missing or empty; copy it from the original"
        )
    return files
