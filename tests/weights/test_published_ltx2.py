"""The published configs of LTX-2 are those that Lightricks' single files tell, in full size."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raydiff.diffusion.flow_match import FlowMatchConfig
from raydiff.models.ltx2.audio_vae import AudioVAEConfig
from raydiff.models.ltx2.connectors import LTX2ConnectorsConfig
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig
from raydiff.models.ltx2.vocoder_config import VocoderConfig, VocoderWithBWEConfig
from raydiff.pipelines.ltx2.modules import BUILDERS
from raydiff.weights.checkpoint import open_checkpoint
from raydiff.weights.published_ltx2 import PUBLISHED_LTX2, LTX2Version
from tests.weights.original import write_header_only
from tests.weights.original_ltx2 import CONFIGS, ltx2_shapes, metadata
from tests.weights.test_ltx2_single_file import FULL_SIZE

GEMMA = (626, 11_766_034_176)
UPSAMPLER = {"2.0": (73, 497_867_904 + 25), "2.3": (72, 497_867_904)}  # 2.0 with a kernel of 5 x 5


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_they_are_those_of_the_single_files(tmp_path: Path, version: LTX2Version) -> None:
    path = tmp_path / "full.safetensors"
    write_header_only(path, ltx2_shapes(CONFIGS[version]), metadata(CONFIGS[version], version))
    checkpoint = open_checkpoint(path)
    read: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "connectors": LTX2ConnectorsConfig.from_dict,
        "transformer": LTX2TransformerConfig.from_dict,
        "vae": LTX2VideoVAEConfig.from_dict,
        "audio_vae": AudioVAEConfig.from_dict,
        "vocoder": (VocoderConfig if version == "2.0" else VocoderWithBWEConfig).from_dict,
    }
    for name, from_dict in read.items():
        assert from_dict(PUBLISHED_LTX2[version][name]) == from_dict(checkpoint.config(name)), name
    schedule = FlowMatchConfig.from_dict(checkpoint.config("scheduler"))
    assert (schedule.base_shift, schedule.max_shift) == (0.95, 2.05)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_they_build_the_published_tensors(version: LTX2Version) -> None:
    expected = {**FULL_SIZE[version], "text_encoder": GEMMA, "latent_upsampler": UPSAMPLER[version]}
    for name, config in PUBLISHED_LTX2[version].items():
        with torch.device("meta"):
            tensors = BUILDERS[name](config).state_dict().values()
        counted = (len(tensors), sum(tensor.numel() for tensor in tensors))
        assert counted == expected[name], name
