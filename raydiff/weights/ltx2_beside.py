"""What stands beside an LTX-2 single file, which holds every component but two: Gemma 3 in a folder
text_encoder/, and the latent upsampler in Lightricks' own file or a folder latent_upsampler/."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff.errors import ModelError
from raydiff.weights.folder import WEIGHT_STEMS, component_weights, list_names, read_json
from raydiff.weights.headers import read_header
from raydiff.weights.ltx2_config import upsampler_config

FOLDERS = {"text_encoder": "transformers", "latent_upsampler": "diffusers"}
"""Component by the library whose names its weight files have."""

VERSION = re.compile(r"ltx-\d+(\.\d+)?")
"""Beginning of the names of Lightricks' files; an upsampler belongs to one version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentFiles:
    """A component that is not in the single file."""

    config: dict[str, Any]
    files: tuple[Path, ...]


def components_beside(path: Path) -> dict[str, ComponentFiles]:
    """Return {component: its files} of what stands beside an LTX-2 single file."""
    folder, found = path.parent, {}
    names = list_names(folder)
    upsampler = _upsampler_file(path)
    if upsampler is not None:
        config = upsampler_config(upsampler, read_header(upsampler))
        found["latent_upsampler"] = ComponentFiles(config=config, files=(upsampler,))
    for component, library in FOLDERS.items():
        if f"{component}/config.json" in names:
            files, _ = component_weights(
                str(folder),
                component,
                WEIGHT_STEMS[library],
                names,
                lambda name: read_json(folder / name),
            )
            found[component] = ComponentFiles(
                config=read_json(folder / component / "config.json"),
                files=tuple(folder / name for name in files),
            )
    return found


def _upsampler_file(path: Path) -> Path | None:
    version = VERSION.match(path.name)
    if version is None:
        return None
    pattern = f"{version.group()}-spatial-upscaler-x2-*.safetensors"
    files = sorted(path.parent.glob(pattern))
    if len(files) > 1:
        raise ModelError(
            f"{path.parent}: {len(files)} upsamplers stand beside {path.name}: "
            f"{', '.join(file.name for file in files)}. Keep one of them there"
        )
    return files[0] if files else None
