"""Find a model by name (folder, single file, alias or Hub id) and read what a run must know of it
before any weight is loaded."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raydiff.errors import ModelError, nearest
from raydiff.request import ModelInfo, VideoModel
from raydiff.weights.aliases import alias_names, read_alias
from raydiff.weights.checkpoint import Checkpoint, list_files, open_checkpoint, open_folder
from raydiff.weights.components import Needed
from raydiff.weights.fingerprint import local_revision
from raydiff.weights.folder import Variant
from raydiff.weights.fp8 import FP8
from raydiff.weights.headers import PICKLE_SUFFIXES, refuse_pickle
from raydiff.weights.single_file import sidecar_file

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")

SIZE_MULTIPLE = 8
"""Pixels to one latent, in the VAEs of both image families."""

CLIP_SIZE = (512, 768)
"""Height and width of LTX-2's clips: its own pipelines' defaults."""

STG_BLOCKS = {"2.0": 29, "2.3": 28}
"""Which block's self attentions spatio-temporal guidance leaves out, by version (Lightricks/LTX-2,
ltx-pipelines, utils/constants.py)."""

CLIP_STEPS = {"2.0": 40, "2.3": 30}
"""Steps by version (same source)."""

CLIP_RESIZES = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
"""How the video VAE's encoder halves a clip where its config does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyDefaults:
    """What a request of the image family uses when it does not say (diffusers' pipeline
    defaults)."""

    num_inference_steps: int
    guidance_scale: float
    strength: float


FAMILY_DEFAULTS = {
    "sd21": FamilyDefaults(num_inference_steps=50, guidance_scale=7.5, strength=0.8),
    "sdxl": FamilyDefaults(num_inference_steps=50, guidance_scale=5.0, strength=0.3),
}

SCHEDULER_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
"""Sampler by the class that scheduler_config.json names."""


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    variant: Variant = "auto",
    dtype: str = "auto",
    needed: Needed | None = None,
    has_weights: bool = True,
) -> ModelInfo:
    """Return what validation and planning need to know; downloads what is not on this machine.

    name: folder in diffusers layout, original .safetensors file, alias (`sdxl`) or Hub id.
    revision: Hub branch, tag or commit. variant, dtype: which weight files, see `choose_files`.
    needed: of which components weights are fetched from the Hub, None for all; those of others
    count no parameters. What is local has all of them, and its revision is that of all.
    has_weights: False for a process that loads nothing. Of weight files that are not in the Hub's
    cache it reads the headers alone; without a connection they must be there all the same.
    A local checkpoint called like an alias comes first, without the alias's defaults.
    Raises ModelError for a model that cannot be found, fetched or used, with the way out.
    """
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    alias = None
    if _look(path) != "checkpoint" and name in alias_names():
        alias = read_alias(name)
        path = alias.path or path
    defaults = {} if alias is None else alias.defaults
    if _look(path) == "checkpoint":
        if revision is not None:
            raise ModelError(
                f"{name}: a local checkpoint has no revision {revision!r}; leave model.revision out"
            )
        path = path.resolve()
        checkpoint = open_checkpoint(path, variant=variant, dtype=dtype)
        files = _files(checkpoint, variant=variant, dtype=dtype)
        return _info(name, checkpoint, local_revision(files), defaults)
    repo, pinned = (_hub_id(name, path), None) if alias is None else (alias.hub_id, alias.revision)
    from raydiff.weights.hub import download_model  # takes 0.3 s, and local names do without

    found = download_model(
        repo,
        revision=revision or pinned,
        variant=variant,
        dtype=dtype,
        needed=needed,
        has_weights=has_weights,
    )
    checkpoint = open_folder(found.path, found.files, found.read_headers().__getitem__)
    return _info(name, checkpoint, found.commit, defaults)


def _look(path: Path) -> Literal["checkpoint", "folder", "nothing"]:
    """Return what is at a path that may as well be an alias or a Hub id."""
    try:
        if path.is_file() or (path / "model_index.json").is_file():
            return "checkpoint"
        return "folder" if path.is_dir() else "nothing"
    except OSError:  # a name that no file can have, for instance one of 1,000 characters
        return "nothing"


def default_sampler(scheduler: dict[str, Any]) -> str:
    """Return the sampler that a scheduler_config.json asks for; ModelError for one we lack."""
    class_name = str(scheduler.get("_class_name"))
    sampler = SCHEDULER_SAMPLERS.get(class_name)
    if sampler is None:
        raise ModelError(
            f"scheduler_config.json: _class_name is {class_name!r}; "
            f"{nearest(class_name, SCHEDULER_SAMPLERS)}known: {', '.join(SCHEDULER_SAMPLERS)}"
        )
    is_sde = str(scheduler.get("algorithm_type")).startswith("sde-")
    return "dpmpp_2m_sde" if sampler == "dpmpp_2m" and is_sde else sampler


def _hub_id(name: str, path: Path) -> str:
    """Return a name that is no local checkpoint and no alias; ModelError unless it is a Hub id."""
    if _look(path) == "folder":
        raise ModelError(
            f"{path}: no model_index.json; expected a pipeline folder in diffusers layout, or the "
            "path of one .safetensors file"
        )
    if path.suffix == ".safetensors" or path.suffix in PICKLE_SUFFIXES:
        refuse_pickle(path)
        raise ModelError(f"{path}: no such file; check the path")
    if HUB_ID.fullmatch(name) is None:
        aliases = alias_names()
        shown = name if len(name) <= 200 else f"{name[:200]}..."
        raise ModelError(
            f"model {shown!r}: no such folder, .safetensors file or alias; {nearest(name, aliases)}"
            f"aliases: {', '.join(aliases)}; or give a Hub id such as {read_alias('sdxl').repo}"
        )
    return name


def _files(checkpoint: Checkpoint, *, variant: Variant, dtype: str) -> dict[str, Path]:
    """Return {name: file} of all files that make up a local checkpoint."""
    path = checkpoint.path
    if path.is_dir():
        names = list_files(path, variant=variant, dtype=dtype).names
        return {name: path / name for name in names}
    # What is not in the file itself stands in files and folders beside it.
    sources = [s for tensors in checkpoint.sources.values() for s in tensors.values()]
    files = {_name_beside(path, source.file): source.file for source in sources}
    configs = {file.parent / "config.json" for file in files.values() if file.parent != path.parent}
    files |= {_name_beside(path, config): config for config in configs}
    sidecar = sidecar_file(path)
    if sidecar is not None:
        files["single.yaml"] = sidecar
    encoders = [name for name in checkpoint.components if name.startswith("text_encoder")]
    for folder in {checkpoint.tokenizer_folder(name) for name in encoders}:
        files |= {
            f"{folder.name}/{file.name}": file
            for file in folder.iterdir()
            if file.suffix in (".json", ".txt")
        }
    return files


def _name_beside(path: Path, file: Path) -> str:
    """Return a file's name among those of a checkpoint, whatever its single file is called."""
    return "single.safetensors" if file == path else file.relative_to(path.parent).as_posix()


def _info(
    name: str, checkpoint: Checkpoint, revision: str, defaults: Mapping[str, float]
) -> ModelInfo:
    """`defaults` are an alias's own."""
    own = _clip_info(checkpoint) if checkpoint.family == "ltx2" else _image_info(checkpoint)
    own |= {f"default_{key}": value for key, value in defaults.items()}
    return ModelInfo(
        name=name,
        family=checkpoint.family,
        path=str(checkpoint.path),
        revision=revision,
        default_sampler=default_sampler(checkpoint.config("scheduler")),
        num_parameters={
            component: sum(math.prod(t.shape) for t in checkpoint.tensors(component).values())
            for component in checkpoint.components
        },
        **own,
    )


def _image_info(checkpoint: Checkpoint) -> dict[str, Any]:
    defaults = FAMILY_DEFAULTS[checkpoint.family]
    height, width = _default_size(checkpoint)
    return {
        "tasks": ("txt2img", "img2img"),
        "default_height": height,
        "default_width": width,
        "size_multiple": SIZE_MULTIPLE,
        "default_num_inference_steps": defaults.num_inference_steps,
        "default_guidance_scale": defaults.guidance_scale,
        "default_strength": defaults.strength,
    }


def _clip_info(checkpoint: Checkpoint) -> dict[str, Any]:
    transformer = checkpoint.config("transformer")
    # From 2.3 on the connectors give the texts in the transformer's own widths.
    version = "2.0" if transformer.get("use_prompt_embeddings", True) else "2.3"
    num_layers = int(transformer.get("num_layers", 48))
    spatial_downscale, temporal_downscale = _clip_downscales(checkpoint)
    height, width = CLIP_SIZE
    return {
        "num_fp8_parameters": _num_fp8_parameters(checkpoint),
        "tasks": ("txt2vid", "img2vid"),
        "default_height": height,
        "default_width": width,
        "size_multiple": spatial_downscale,
        "default_num_inference_steps": CLIP_STEPS[version],
        "default_guidance_scale": 3.0,
        "default_strength": 1.0,
        "samplers": ("euler",),
        "video": VideoModel(
            num_layers=num_layers,
            # A smaller network has no such block: its last stands for it.
            default_stg_block=min(STG_BLOCKS[version], num_layers - 1),
            spatial_downscale=spatial_downscale,
            temporal_downscale=temporal_downscale,
            has_upsampler="latent_upsampler" in checkpoint.components,
        ),
    }


def _num_fp8_parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Count those of transformers; other components' fp8 weights are loaded in full."""
    return {
        name: sum(math.prod(t.shape) for t in checkpoint.tensors(name).values() if t.dtype == FP8)
        for name in checkpoint.components
        if name.endswith("transformer")
    }


def _clip_downscales(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the pixels along a side of a latent, and the frames of a latent frame."""
    vae = checkpoint.config("vae")
    resizes, patch_size = vae.get("downsample_type", CLIP_RESIZES), vae.get("patch_size", 4)
    if not (isinstance(resizes, list | tuple) and isinstance(patch_size, int)):
        raise ModelError(
            f"{checkpoint.path}: vae/config.json has downsample_type {resizes!r} and patch_size "
            f"{patch_size!r}; the sizes of clips are read from them"
        )
    spatial, temporal = (
        sum(resize in (axis, "spatiotemporal") for resize in resizes)
        for axis in ("spatial", "temporal")
    )
    return int(patch_size) * 2**spatial, 2**temporal


def _default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return (height, width): the UNet's sample size in pixels."""
    sample_size = checkpoint.config("unet").get("sample_size")
    height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
    levels = checkpoint.config("vae").get("block_out_channels")
    if not (isinstance(height, int) and isinstance(width, int) and isinstance(levels, list)):
        raise ModelError(
            f"{checkpoint.path}: unet/config.json has sample_size {sample_size!r} and "
            f"vae/config.json block_out_channels {levels!r}; the default size is read from them"
        )
    factor = 2 ** (len(levels) - 1)
    return height * factor, width * factor
