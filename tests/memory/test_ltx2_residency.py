"""LTX-2 under every memory profile: its components come to the GPU and leave, and the clip is the
same.

`cpu:0` stands for a GPU where clips are made: weights are copied to it, and computed with there.
The meta device stands for one where a weight that was left on the host raises.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raydiff.config import ProfileName
from raydiff.memory.profiles import Profile, load_profile
from raydiff.memory.residency import Residency
from raydiff.models.ltx2.rope import LatentSize
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.ltx2.components import LTX2Components
from raydiff.pipelines.ltx2.decoder import ClipDecoder
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from tests.pipelines.tiny_ltx2 import clip_request

GPU_PROFILES: tuple[ProfileName, ...] = ("balanced", "gpu_poor", "extreme")


def on_stand_in(name: ProfileName, device: str) -> Profile:
    """Return the profile with its GPU components on another device."""
    profile = load_profile(name)
    devices = {kind: device if own == "cuda" else own for kind, own in profile.devices.items()}
    return replace(profile, devices=devices)


def load(folder: Path) -> LTX2Pipeline:
    pipeline = load_pipeline(str(folder), device="cpu")
    assert isinstance(pipeline, LTX2Pipeline)
    return pipeline


def pointers(parts: LTX2Components) -> dict[str, list[int]]:
    """Return where each component's weights are."""
    return {
        name: [tensor.data_ptr() for tensor in module.parameters()]
        for name, module in parts.modules.items()
    }


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_clips_are_the_same_under_every_profile(tiny_ltx2: Path, name: ProfileName) -> None:
    here, there = load(tiny_ltx2), load(tiny_ltx2)
    there = LTX2Pipeline(
        info=there.info,
        components=there.parts,
        profile=on_stand_in(name, "cpu:0"),
        dtype=torch.float32,
    )
    assert there.device == torch.device("cpu:0")
    before = pointers(there.parts)
    size = {"height": 64, "width": 128, "num_frames": 9, "frame_rate": 25.0}
    one = clip_request(here, "a red cat", "two_stage", seed=1, num_inference_steps=3, **size)
    expected, clip = here.render([one]), there.render([one])
    assert clip.errors == (None,)
    assert np.abs(clip.pixels[0].astype(int) - expected.pixels[0]).max() <= 1
    assert clip.audio[0] is not None
    assert expected.audio[0] is not None
    np.testing.assert_allclose(clip.audio[0].samples, expected.audio[0].samples, atol=1e-4)
    assert pointers(there.parts) == before


@torch.inference_mode()
@pytest.mark.parametrize("name", GPU_PROFILES)
@pytest.mark.parametrize("checkpoint", ["tiny_ltx2", "tiny_ltx23"])
def test_all_that_computes_is_on_the_gpu_meanwhile(
    checkpoint: str, name: ProfileName, request: pytest.FixtureRequest
) -> None:
    parts = load(request.getfixturevalue(checkpoint)).parts
    profile = on_stand_in(name, "meta")
    residency = Residency(parts.modules, profile)
    size = LatentSize(2, 2, 3)

    device = residency.device_of("text_encoder")
    ids = torch.ones(1, 8, dtype=torch.int64, device=device)
    with residency.on_device("text_encoder", "connectors"):
        features = parts.connectors.project(parts.text_encoder(ids, ids), ids)
    assert all(stream.device == device for stream in features)

    config, meta = parts.transformer.config, torch.device("meta")
    text = {"video": config.caption_channels or config.dim}
    text["audio"] = config.caption_channels or config.audio_dim
    with residency.on_device("transformer"):
        context = parts.transformer.precompute_context(
            *(torch.empty(1, 16, width, device=meta) for width in text.values()),
            latent_size=size,
            num_audio_tokens=9,
            frame_rates=[25.0],
        )
        velocity = parts.transformer(
            torch.empty(1, 12, config.in_channels, device=meta),
            torch.empty(1, 9, config.audio_in_channels, device=meta),
            context,
            sigmas=torch.empty(1, device=meta),
            perturbed={0: torch.empty(1, dtype=torch.bool, device=meta)},
        )
    assert (velocity.video.device, velocity.audio.device) == (meta, meta)

    decoder = ClipDecoder(parts.vae, parts.audio_vae, parts.vocoder, residency)
    frames = list(decoder.pixels(torch.empty(16, *size), profile))
    assert sum(len(part) for part in frames) == 9
    assert {part.device for part in frames} == {meta}
    with residency.on_device("audio_vae", "vocoder"):
        mel = parts.audio_vae.decode(torch.empty(1, 4, 9, 4, device=meta))
        assert parts.vocoder(mel).device == meta
    assert {tensor.device.type for m in parts.modules.values() for tensor in m.parameters()} == {
        "cpu"
    }
