"""On a GPU: every memory profile gives the CPU's image, frees what it says, and the engine runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import raydiff
from raydiff.memory.profiles import PROFILES
from raydiff.pipelines.load import load_pipeline
from raydiff.request import RenderRequest

pytestmark = pytest.mark.gpu


def requests(model: str) -> list[RenderRequest]:
    """Return three rows that differ in guidance, steps and sampler."""
    return [
        RenderRequest(
            model=model,
            model_revision="",
            task="txt2img",
            prompt=f"number {seed}",
            negative_prompt=None,
            seed=seed,
            height=64,
            width=96,
            num_inference_steps=3 + seed,
            guidance_scale=guidance_scale,
            guidance_rescale=0.0,
            sampler=sampler,
        )
        for seed, (guidance_scale, sampler) in enumerate(
            [(1.0, "euler"), (5.0, "dpmpp_2m"), (7.5, "euler_ancestral")]
        )
    ]


@pytest.mark.parametrize("family", ["tiny_sd21", "tiny_sdxl"])
@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_gives_the_cpus_image(
    family: str, profile: str, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(family))
    expected = load_pipeline(folder, device="cpu").render(requests(folder))
    before = torch.cuda.memory_allocated()
    pipeline = load_pipeline(folder, profile=profile, dtype="float32")
    resting = torch.cuda.memory_allocated() - before
    rendered = pipeline.render(requests(folder))
    again = pipeline.render(requests(folder))
    for ours, theirs in zip(rendered.pixels, expected.pixels, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 2
    for ours, theirs in zip(rendered.pixels, again.pixels, strict=True):
        assert np.array_equal(ours, theirs)
    if profile == "full_gpu":
        assert resting > 1_000_000
    else:
        assert resting == 0  # nothing stays on the GPU between phases


@pytest.mark.filterwarnings("ignore::UserWarning")  # Inductor's advice about this GPU
def test_compiled_equals_eager(tiny_sdxl: Path) -> None:
    from raydiff.config import ModelConfig

    eager = load_pipeline(str(tiny_sdxl), dtype="float32")
    compiled = load_pipeline(str(tiny_sdxl), dtype="float32", config=ModelConfig(compile=True))
    pairs = zip(
        eager.render(requests("m")).pixels, compiled.render(requests("m")).pixels, strict=True
    )
    for left, right in pairs:
        assert np.abs(left.astype(int) - right).max() <= 2


def test_render_uses_the_gpu_through_ray(tiny_sdxl: Path, tmp_path: Path) -> None:
    prompts = [argument for i in range(20) for argument in ("--prompt", f"prompt {i}")]
    run = subprocess.run(
        [
            sys.executable, "-m", "raydiff", "render", *prompts, "--model", str(tiny_sdxl),
            "--out", str(tmp_path / "out"), "--set", "defaults.num_inference_steps=4", "--json",
        ],
        capture_output=True, text=True, check=False, env=os.environ, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["completed"] == 20
    results = raydiff.read_results(tmp_path / "out").to_pylist()
    assert {row["device"] for row in results} == {torch.cuda.get_device_name()}
    assert {row["profile"] for row in results} == {"full_gpu"}
    assert {row["dtype"] for row in results} == {"bfloat16"}
    assert all(row["peak_vram_bytes"] > 0 for row in results)
