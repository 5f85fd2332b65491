"""The real renderer with tiny pipelines, in this process."""

from pathlib import Path

import numpy as np
import pytest

from raydiff.config import MemoryConfig, ModelConfig
from raydiff.engine.renderers import PipelineRenderer
from raydiff.errors import ModelError
from raydiff.request import ModelInfo, RenderRequest, with_request_id
from raydiff.weights.resolve import resolve_model


def request(info: ModelInfo, seed: int, **values: object) -> RenderRequest:
    fields = {
        "model": info.name,
        "model_revision": info.revision,
        "task": "txt2img",
        "prompt": "a lighthouse " * (1 + 40 * seed),
        "negative_prompt": None,
        "seed": seed,
        "height": 64,
        "width": 64,
        "num_inference_steps": 1,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "sampler": "ddim",
    }
    return with_request_id(RenderRequest(**{**fields, **values}))  # type: ignore[arg-type]


@pytest.fixture
def renderer(tiny_sd21: Path) -> PipelineRenderer:
    memory = MemoryConfig(profile="cpu_only")
    info = resolve_model(str(tiny_sd21))
    return PipelineRenderer(model=ModelConfig(name=info.name), memory=memory, preload=info)


def test_rows_are_rendered_and_described(renderer: PipelineRenderer, tiny_sd21: Path) -> None:
    renderer.start()
    info = resolve_model(str(tiny_sd21))
    requests = [request(info, seed) for seed in range(2)]
    assert renderer.max_batch_size(requests[0]) >= 1
    rendered = renderer.render(requests)
    assert [image.shape for image in rendered.pixels] == [(64, 64, 3)] * 2
    assert all(image.dtype == np.uint8 for image in rendered.pixels)
    assert not np.array_equal(rendered.pixels[0], rendered.pixels[1])
    assert (rendered.profile, rendered.dtype) == ("cpu_only", "float32")
    assert rendered.warnings[0] is None
    assert rendered.warnings[1] is not None
    assert rendered.denoise_s > 0
    assert rendered.peak_vram_bytes is None


def test_another_model_takes_the_place_of_the_last(
    renderer: PipelineRenderer, tiny_sd21: Path, tiny_sdxl: Path
) -> None:
    renderer.start()
    small, large = resolve_model(str(tiny_sd21)), resolve_model(str(tiny_sdxl))
    before = renderer.render([request(small, 0)]).pixels[0]
    assert renderer.render([request(large, 0)]).pixels[0].shape == (64, 64, 3)
    after = renderer.render([request(small, 0)]).pixels[0]
    assert np.array_equal(before, after)


def test_a_checkpoint_that_changed_is_refused(renderer: PipelineRenderer, tiny_sdxl: Path) -> None:
    info = resolve_model(str(tiny_sdxl))
    changed = request(info, 0, model_revision="local-of-yesterday")
    for _ in range(2):
        with pytest.raises(ModelError, match="files changed during the run"):
            renderer.render([changed])
