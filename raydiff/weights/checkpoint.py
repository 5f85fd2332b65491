"""A checkpoint, whatever its layout: configs, and every component's tensors under our names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydiff.errors import ModelError
from raydiff.weights.components import Needed
from raydiff.weights.folder import FolderFiles, Variant, choose_files, list_names, read_json
from raydiff.weights.fp8 import refuse_other_quantisation, with_standard_scales
from raydiff.weights.headers import TensorHeader, read_header, refuse_pickle
from raydiff.weights.keymaps.clip import TRANSFORMERS_CLIP
from raydiff.weights.keymaps.ltx2 import GEMMA3
from raydiff.weights.keymaps.rules import KeyMap, To, rename
from raydiff.weights.keymaps.skipped import SKIPPED_IN_FOLDERS
from raydiff.weights.keymaps.vae import DIFFUSERS_VAE
from raydiff.weights.ltx2_beside import components_beside
from raydiff.weights.ltx2_config import ltx2_configs
from raydiff.weights.published import single_file_configs
from raydiff.weights.single_file import SplitFile, prediction_type, skip_reason, split_file
from raydiff.weights.sources import TensorSource, tensor_sources

ReadHeader = Callable[[Path], Mapping[str, TensorHeader]]

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "sd21",
    "StableDiffusionImg2ImgPipeline": "sd21",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "LTX2Pipeline": "ltx2",
    "LTX2ImageToVideoPipeline": "ltx2",
}
"""Family by the pipeline class that model_index.json names."""

REQUIRED_COMPONENTS: dict[str, tuple[str, ...]] = {
    "sd21": ("text_encoder", "unet", "vae"),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae"),
    # Prompts may come encoded already, so the text encoder may be absent.
    "ltx2": ("connectors", "transformer", "vae", "audio_vae", "vocoder"),
}

FOLDER_KEYMAPS: dict[str, KeyMap] = {
    "text_encoder": TRANSFORMERS_CLIP,
    "text_encoder_2": TRANSFORMERS_CLIP,
    "vae": DIFFUSERS_VAE,
}
"""Renames of older or newer spellings in diffusers folders; the UNet's names have never changed."""

LTX2_FOLDER_KEYMAPS: dict[str, KeyMap] = {"text_encoder": GEMMA3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An opened checkpoint; `path` is the folder or the single file."""

    path: Path
    family: str
    configs: Mapping[str, dict[str, Any]]
    sources: Mapping[str, Mapping[str, TensorSource]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Tensors left out on purpose: {name in the file (behind its folder's): reason}."""

    @property
    def components(self) -> tuple[str, ...]:
        """Components with weights: text_encoder, unet, vae and others by the family."""
        return tuple(self.sources)

    def config(self, component: str) -> dict[str, Any]:
        """Return the config of a component, of `scheduler` or of `model_index`."""
        return dict(self.configs[component])

    def tensors(self, component: str) -> dict[str, TensorSource]:
        """Return {our name: where it is, dtype, shape, size_bytes} of a component."""
        return dict(self.sources[component])

    def tokenizer_folder(self, text_encoder: str) -> Path:
        """Return the folder of the tokenizer that belongs to `text_encoder` or `text_encoder_2`.

        A single file carries none: a folder of that name beside it is taken, else the tokenizer of
        the family's published checkpoint, from the Hub or its cache (not Gemma's, which is gated).
        """
        folder = self.local_tokenizer_folder(text_encoder)
        if folder is not None:
            return folder
        name = _tokenizer_name(text_encoder)
        if self.family == "ltx2":
            raise ModelError(
                f"{self._folder / name}: no such folder; put Gemma 3's there, with its "
                "tokenizer.json"
            )
        from raydiff.weights.hub import download_tokenizer  # takes 0.3 s, and is rarely needed

        return download_tokenizer(self.family, name)

    def local_tokenizer_folder(self, text_encoder: str) -> Path | None:
        """Return the tokenizer's folder in the checkpoint or beside its file, None without one."""
        folder = self._folder / _tokenizer_name(text_encoder)
        return folder if folder.is_dir() else None

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def _tokenizer_name(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def open_checkpoint(
    path: str | Path,
    *,
    variant: Variant = "auto",
    dtype: str = "auto",
    needed: Needed | None = None,
) -> Checkpoint:
    """Open a diffusers folder or an original single file; reads configs and headers only.

    `variant` and `dtype` choose among fp16 and plain weight files as in `choose_files`. The weights
    of a folder's components that are not `needed` may be missing: they have no tensors then.
    Raises ModelError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path, list_files(path, variant=variant, dtype=dtype, needed=needed))
    refuse_pickle(path)
    return _open_single_file(path)


def list_files(
    folder: Path, *, variant: Variant, dtype: str, needed: Needed | None = None
) -> FolderFiles:
    """Return the files of a local diffusers folder that are used."""
    return choose_files(
        str(folder),
        list_names(folder),
        lambda name: read_json(folder / name),
        variant=variant,
        dtype=dtype,
        needed=needed,
    )


def open_folder(
    folder: Path, files: FolderFiles, read_header: ReadHeader = read_header
) -> Checkpoint:
    """Open a diffusers folder whose files are chosen; its weight files may lie elsewhere, where
    `read_header` reads them."""
    configs = {name: read_json(folder / name / "config.json") for name in files.weights}
    family = _folder_family(folder, files.model_index, configs)
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    configs["model_index"] = files.model_index
    keymaps = LTX2_FOLDER_KEYMAPS if family == "ltx2" else FOLDER_KEYMAPS
    sources: dict[str, dict[str, TensorSource]] = {}
    skipped: dict[str, str] = {}
    for component, names in files.weights.items():
        paths = [folder / name for name in names]
        sources[component] = component_sources(component, paths, skipped, keymaps, read_header)
    return Checkpoint(path=folder, family=family, configs=configs, sources=sources, skipped=skipped)


def component_sources(
    component: str,
    files: list[Path],
    skipped: dict[str, str],
    keymaps: Mapping[str, KeyMap] = FOLDER_KEYMAPS,
    read_header: ReadHeader = read_header,
) -> dict[str, TensorSource]:
    """Return {our name: source} of a component's weight files; adds to `skipped`."""
    keymap = keymaps.get(component, {})
    sources: dict[str, TensorSource] = {}
    for file in files:
        for key, header in read_header(file).items():
            reason = skip_reason(key, SKIPPED_IN_FOLDERS)
            if reason is not None:
                skipped[f"{component}.{key}"] = reason
                continue
            # A name that no table has keeps its spelling; loading then calls it unexpected.
            sources |= tensor_sources(file, key, header, rename(keymap, key) or To((key,)))
    return with_standard_scales(sources)


def _folder_family(
    folder: Path, model_index: Mapping[str, Any], configs: Mapping[str, dict[str, Any]]
) -> str:
    class_name = model_index.get("_class_name")
    family = FAMILIES.get(str(class_name))
    if family is None:
        raise ModelError(
            f"{folder}: model_index.json names the pipeline {class_name!r}; "
            f"raydiff renders {', '.join(FAMILIES)}"
        )
    missing = [name for name in REQUIRED_COMPONENTS[family] if name not in configs]
    if missing == ["text_encoder"] and family == "sdxl":
        raise ModelError(
            f"{folder}: this is the SDXL refiner (it has no text_encoder); "
            "raydiff renders SDXL base. Use sdxl"
        )
    if missing:
        raise ModelError(f"{folder}: model_index.json lists no {', '.join(missing)}")
    if family == "ltx2":
        return family
    unet = configs["unet"]
    if family == "sd21" and unet.get("cross_attention_dim") == 768:
        raise ModelError(
            f"{folder}: this is Stable Diffusion 1.x (cross_attention_dim 768); "
            "raydiff renders SD 2.x and SDXL. Use sd21 or sdxl"
        )
    if (unet.get("addition_embed_type") == "text_time") != (family == "sdxl"):
        raise ModelError(
            f"{folder}: model_index.json names {class_name}, but unet/config.json has "
            f"addition_embed_type {unet.get('addition_embed_type')!r}; "
            "SDXL, and only SDXL, has text_time"
        )
    _check_channels(folder, unet.get("in_channels", 4))
    return family


def _check_channels(path: Path, in_channels: int) -> None:
    if in_channels != 4:
        raise ModelError(
            f"{path}: its UNet has {in_channels} input channels (inpainting or the like); "
            "raydiff renders checkpoints with 4"
        )


def _open_single_file(path: Path) -> Checkpoint:
    split = split_file(path)
    if split.unknown:
        listed = ", ".join(split.unknown[:10])
        raise ModelError(
            f"{path}: {len(split.unknown)} tensors are in no table of {split.family}: {listed}. "
            "The file is of another kind, or merged from several"
        )
    empty = [name for name, sources in split.components.items() if not sources]
    if empty:
        raise ModelError(
            f"{path}: has no {', '.join(empty)}; use the complete checkpoint, or a diffusers folder"
        )
    if split.family == "ltx2":
        return _open_ltx2_file(path, split)
    configs = single_file_configs(
        split.family,
        split.components,
        prediction_type(path, split.family, split.skipped),
        has_zero_terminal_snr="ztsnr" in split.skipped,
    )
    _check_channels(path, configs["unet"]["in_channels"])
    return Checkpoint(
        path=path,
        family=split.family,
        configs=configs,
        sources=split.components,
        skipped=split.skipped,
    )


def _open_ltx2_file(path: Path, split: SplitFile) -> Checkpoint:
    refuse_other_quantisation(path, split.components["transformer"])
    configs = ltx2_configs(path, split.components)
    sources, skipped = dict(split.components), dict(split.skipped)
    for component, beside in components_beside(path).items():
        configs[component] = beside.config
        sources[component] = component_sources(
            component, list(beside.files), skipped, LTX2_FOLDER_KEYMAPS
        )
    return Checkpoint(path=path, family="ltx2", configs=configs, sources=sources, skipped=skipped)
