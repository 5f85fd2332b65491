"""On a GPU: every memory profile makes the CPU's clips, compiled blocks too, and fp8 is multiplied
as fp8."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydiff.config import ModelConfig
from raydiff.memory.profiles import PROFILES
from raydiff.output.rendered import Rendered
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.pipelines.quantize import quantize
from tests.pipelines.tiny_ltx2 import clip_request

pytestmark = pytest.mark.gpu

SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "frame_rate": 25.0}
NAMES = ["tiny_ltx2", "tiny_ltx23"]


def render(pipeline: Any) -> Rendered:
    """Return three clips that differ in seed, steps and guidance."""
    assert isinstance(pipeline, LTX2Pipeline)
    rows = [(1, 3, 4.0), (2, 4, 1.0), (3, 3, 3.0)]
    return pipeline.render(
        [
            clip_request(
                pipeline,
                f"number {seed}",
                seed=seed,
                **SIZE,
                num_inference_steps=steps,
                guidance_scale=scale,
            )
            for seed, steps, scale in rows
        ]
    )


def assert_alike(left: Rendered, right: Rendered, levels: int, sound: float) -> None:
    for ours, theirs in zip(left.pixels, right.pixels, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= levels
    for one, other in zip(left.audio, right.audio, strict=True):
        assert one is not None
        assert other is not None
        assert np.abs(one.samples - other.samples).max() <= sound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_makes_the_cpus_clips(
    name: str, profile: str, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(name))
    expected = render(load_pipeline(folder, device="cpu"))
    before = torch.cuda.memory_allocated()
    pipeline = load_pipeline(folder, profile=profile, dtype="float32")
    resting = torch.cuda.memory_allocated() - before
    rendered, again = render(pipeline), render(pipeline)
    assert_alike(rendered, expected, 2, 5e-3)
    assert_alike(rendered, again, 0, 0.0)
    assert (resting > 0) == (profile == "full_gpu")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Inductor's advice about this GPU
def test_compiled_equals_eager(tiny_ltx2: Path) -> None:
    eager = load_pipeline(str(tiny_ltx2), dtype="float32")
    compiled = load_pipeline(str(tiny_ltx2), dtype="float32", config=ModelConfig(compile=True))
    assert_alike(render(eager), render(compiled), 2, 5e-3)


def test_an_fp8_copy_is_multiplied_as_fp8(tiny_ltx2: Path, tmp_path: Path) -> None:
    quantize(tiny_ltx2, tmp_path / "fp8")
    plain = render(load_pipeline(str(tiny_ltx2)))
    fp8 = load_pipeline(str(tmp_path / "fp8"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rough = render(fp8)
    assert any(event.key == "aten::_scaled_mm" for event in profile.key_averages())
    for ours, theirs in zip(rough.pixels, plain.pixels, strict=True):
        assert 0 < np.abs(ours.astype(int) - theirs).mean() < 20
