"""Numbers that overflow: in the UNet a row fails alone, in the VAE it is decoded in float32."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydiff.config import ModelConfig
from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.load import load_pipeline
from raydiff.request import RenderRequest

HUGE = 3e38
"""Finite in float32, but not twice of it."""


def request(pipeline: Pipeline, seed: int, **values: object) -> RenderRequest:
    base = RenderRequest(
        model=pipeline.info.name,
        model_revision=pipeline.info.revision,
        task="txt2img",
        prompt="a lighthouse",
        negative_prompt="fog",
        seed=seed,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=2.0,
        guidance_rescale=0.0,
        sampler="ddim",
    )
    return replace(base, **values)  # type: ignore[arg-type]


def with_vae(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Copy a checkpoint and change the weights of its VAE."""
    shutil.copytree(folder, to)
    file = to / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return str(to)


def larger(weights: dict[str, Tensor]) -> None:
    """Let the decoder's first map leave float16, whose largest number is 65504."""
    weights["decoder.conv_in.weight"] *= 20_000


def black(weights: dict[str, Tensor]) -> None:
    """Let every colour be far below black."""
    weights["decoder.conv_out.bias"] -= 10_000


def latents() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def test_a_row_whose_latents_overflow_fails_alone(tiny_sdxl: Path) -> None:
    pipeline = load_pipeline(str(tiny_sdxl), device="cpu")
    rows = [request(pipeline, 1), request(pipeline, 2, guidance_scale=HUGE), request(pipeline, 3)]
    rendered = pipeline.render(rows)
    assert rendered.errors[0] is rendered.errors[2] is None
    assert rendered.errors[1] is not None
    assert rendered.errors[1].startswith(
        "NaN in latents after evaluation 1 of the UNet in float32. Try another guidance_scale"
    )
    assert rendered.warnings == (None, None, None)
    assert not rendered.pixels[1].any()
    good = pipeline.render([rows[0], rows[2]])
    for pixels, alone in zip((rendered.pixels[0], rendered.pixels[2]), good.pixels, strict=True):
        assert np.abs(pixels.astype(int) - alone).max() <= 1


def test_the_error_names_a_wider_dtype(tiny_sd21: Path) -> None:
    pipeline = load_pipeline(str(tiny_sd21), device="cpu", dtype="bfloat16")
    (error,) = pipeline.render([request(pipeline, 1, guidance_scale=HUGE)]).errors
    assert error is not None
    assert error.endswith("in bfloat16. Try --set model.dtype=float32.")


def test_what_overflows_in_float16_is_decoded_in_float32(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = with_vae(tiny_sdxl, tmp_path / "model", larger)
    half = load_pipeline(folder, device="cpu", config=ModelConfig(vae_dtype="float16"))
    exact = load_pipeline(folder, device="cpu")
    batch = latents()
    decoded = half.decode_rows(batch)
    assert decoded.errors == (None, None, None)
    assert set(decoded.warnings) == {
        "decoded in float32: in float16 the VAE made NaN or infinity of it"
    }
    # The weights went through float16, the arithmetic did not.
    expected = exact.decode(batch)
    assert np.abs(decoded.pixels.astype(int) - expected).mean() < 1
    assert decoded.pixels.std() > 3
    for row in range(3):
        assert np.array_equal(half.decode(batch[row : row + 1])[0], decoded.pixels[row])


def test_only_the_rows_that_overflow_are_decoded_again(tiny_sdxl: Path) -> None:
    half = load_pipeline(str(tiny_sdxl), device="cpu", config=ModelConfig(vae_dtype="float16"))
    batch = latents()
    batch[1] *= 20_000
    decoded = half.decode_rows(batch)
    assert decoded.errors == (None, None, None)
    assert [warning is not None for warning in decoded.warnings] == [False, True, False]


def test_a_row_that_overflows_in_float32_too_fails_alone(tiny_sdxl: Path) -> None:
    pipeline = load_pipeline(str(tiny_sdxl), device="cpu")
    batch = latents()
    batch[1] = HUGE
    decoded = pipeline.decode_rows(batch)
    assert decoded.errors[0] is decoded.errors[2] is None
    assert decoded.errors[1] is not None
    assert decoded.errors[1].startswith(
        "VAE overflow: the VAE made NaN or infinity of good latents"
    )
    batch[1] = batch[0]
    assert np.array_equal(pipeline.decode(batch)[[0, 2]], decoded.pixels[[0, 2]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wholly_black_image_is_an_error(tiny_sd21: Path, tmp_path: Path, dtype: str) -> None:
    folder = with_vae(tiny_sd21, tmp_path / "model", black)
    pipeline = load_pipeline(folder, device="cpu", dtype=dtype)  # type: ignore[arg-type]
    (error,) = pipeline.render([request(pipeline, 1)]).errors
    assert error is not None
    assert error.startswith("VAE overflow: the VAE made a wholly black image of good latents")


def test_float32_weights_are_made_when_they_are_needed(tiny_sdxl: Path) -> None:
    pipeline = load_pipeline(str(tiny_sdxl), device="cpu", dtype="bfloat16")
    decoder = pipeline._decoder  # type: ignore[attr-defined]
    assert pipeline.render([request(pipeline, 1)]).errors == (None,)
    assert decoder._float32 is None
    batch = latents()
    batch[1] = HUGE
    pipeline.decode_rows(batch)
    copy = decoder._float32
    pipeline.decode_rows(batch)
    assert decoder._float32 is copy
    assert copy._vae.dtype == torch.float32
