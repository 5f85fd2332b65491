"""On a GPU: texts alone and together, split and fused, numbers that overflow, too little memory."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from raydiff.config import MemoryConfig, ModelConfig, OutputConfig
from raydiff.engine.messages import BatchReply, texts_of
from raydiff.engine.renderers import PipelineRenderer
from raydiff.engine.worker import Worker, WorkerSpec
from raydiff.pipelines.load import load_pipeline
from raydiff.request import BatchKey, RenderBatch, RenderRequest, with_request_id
from raydiff.weights.resolve import resolve_model

pytestmark = pytest.mark.gpu

TEXTS = tuple(f"number {index} " * (1 + index) for index in range(19))


def requests(folder: Path, num_rows: int = 3, **values: object) -> list[RenderRequest]:
    info = resolve_model(str(folder))
    fields = {
        "model": info.name,
        "model_revision": info.revision,
        "task": "txt2img",
        "negative_prompt": None,
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "guidance_rescale": 0.0,
        "sampler": "ddim",
    }
    return [
        with_request_id(RenderRequest(**{**fields, "prompt": TEXTS[n], "seed": n, **values}))  # type: ignore[arg-type]
        for n in range(num_rows)
    ]


def renderer(folder: Path, role: str, **memory: object) -> PipelineRenderer:
    info = resolve_model(str(folder))
    made = PipelineRenderer(
        model=ModelConfig(name=info.name),
        memory=MemoryConfig.model_validate(memory),
        preload=info,
        role=role,  # type: ignore[arg-type]
    )
    made.start()
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["tiny_sd21", "tiny_sdxl"])
def test_a_text_is_encoded_as_if_it_were_alone(
    family: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(family))
    pipeline = load_pipeline(folder, dtype=dtype, stages=["encode"])  # type: ignore[arg-type]
    alone = {text: pipeline.encode_texts([text])[0] for text in TEXTS}
    for order in (TEXTS, TEXTS[::-1], TEXTS[3:14]):
        for text, encoded in zip(order, pipeline.encode_texts(order), strict=True):
            assert encoded.embeds.device.type == "cpu"
            assert torch.equal(encoded.embeds, alone[text].embeds)
            if encoded.pooled is not None:
                assert torch.equal(encoded.pooled, alone[text].pooled)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", ["full_gpu", "gpu_poor"])
def test_split_and_fused_are_equal_byte_for_byte(tiny_sdxl: Path, profile: str) -> None:
    rows = requests(tiny_sdxl)
    texts = list(dict.fromkeys(text for row in rows for text in texts_of(row)))
    fused = renderer(tiny_sdxl, "fused", profile=profile).render(rows)
    encoded = renderer(tiny_sdxl, "encode", profile=profile).encode(texts)
    embeds = dict(zip(texts, encoded.embeds, strict=True))
    denoised = renderer(tiny_sdxl, "denoise", profile=profile).denoise(rows, embeds)  # type: ignore[arg-type]
    assert {latents.device.type for latents in denoised.latents} == {"cpu"}  # type: ignore[attr-defined]
    decoded = renderer(tiny_sdxl, "decode", profile=profile).decode(rows, denoised.latents)  # type: ignore[arg-type]
    assert fused.dtype == "bfloat16"
    for ours, theirs in zip(fused.pixels, decoded.pixels, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("profile", ["full_gpu", "extreme"])
def test_what_overflows_in_float16_is_decoded_in_float32(tiny_sdxl: Path, profile: str) -> None:
    config = ModelConfig(vae_dtype="float16")
    half = load_pipeline(str(tiny_sdxl), profile=profile, config=config, stages=["decode"])
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    latents[1] *= 20_000
    decoded = half.decode_rows(latents)
    assert decoded.errors == (None, None, None)
    assert [warning is not None for warning in decoded.warnings] == [False, True, False]
    before = torch.cuda.memory_allocated()
    half.decode_rows(latents)
    assert torch.cuda.memory_allocated() == before
    latents[1] = 3e38
    assert [error is not None for error in half.decode_rows(latents).errors] == [False, True, False]


def test_a_row_that_fits_no_profile_fails_alone(tiny_sd21: Path, tmp_path: Path) -> None:
    """Of 24 MiB that are left, an image of 4096 x 4096 needs many times as much."""
    info = resolve_model(str(tiny_sd21))
    spec = WorkerSpec(
        renderer="raydiff.engine.renderers:PipelineRenderer",
        arguments={
            "model": ModelConfig(name=info.name),
            "memory": MemoryConfig(profile="full_gpu"),
            "preload": info,
        },
        out=str(tmp_path),
        output=OutputConfig(),
    )

    def batch(size: int) -> RenderBatch:
        rows = tuple(requests(tiny_sd21, 2, height=size, width=size))
        return RenderBatch(batch_id=size, key=BatchKey(info.name, size, size), requests=rows)

    async def replies() -> list[BatchReply]:
        worker = Worker("w0", spec)
        await worker.start()
        before = await worker.render(batch(64))
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + 24 * 2**20
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        return [before, await worker.render(batch(4096)), await worker.render(batch(64))]

    try:
        before, huge, after = asyncio.run(replies())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [result.status for result in huge.results] == ["failed", "failed"]
    assert all("does not fit" in (result.error or "") for result in huge.results)
    assert [warning.rpartition(" ")[2] for warning in huge.warnings] == [
        "balanced",
        "gpu_poor",
        "extreme",
    ]
    for reply in (before, after):
        assert {(result.status, result.profile) for result in reply.results} == {
            ("completed", "full_gpu")
        }
