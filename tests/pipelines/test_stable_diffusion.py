"""Pipelines: mixed batches, stages called apart, memory policies, caching, errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import raydiff
from raydiff.config import MemoryConfig, ModelConfig
from raydiff.errors import ConfigError, ModelError
from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.tiny import make_tiny
from raydiff.request import SAMPLERS, RenderRequest


def request(pipeline: Pipeline, **values: object) -> RenderRequest:
    """Return a small request of this pipeline with some values changed."""
    base = RenderRequest(
        model=pipeline.info.name,
        model_revision=pipeline.info.revision,
        task="txt2img",
        prompt="two red cubes",
        negative_prompt=None,
        seed=1,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=7.5,
        guidance_rescale=0.0,
        sampler="ddim",
    )
    return replace(base, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["tiny_sd21", "tiny_sdxl"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    """Return each family's tiny pipeline."""
    return raydiff.load_pipeline(str(request.getfixturevalue(request.param)), device="cpu")


@pytest.fixture
def init_image(tmp_path: Path) -> str:
    """Return the path of a random picture, larger than the requests and of another aspect."""
    pixels = np.random.default_rng(3).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "init.png")
    return str(tmp_path / "init.png")


def mixed_requests(pipeline: Pipeline, init_image: str) -> list[RenderRequest]:
    """Return rows that differ in everything a batch may mix."""
    image = {"task": "img2img", "init_image": init_image, "strength": 0.6}
    return [
        request(pipeline, seed=1),
        request(pipeline, seed=2, prompt="a blue bird", num_inference_steps=7, guidance_scale=1.0),
        request(pipeline, seed=3, negative_prompt="", sampler="euler_ancestral", guidance_scale=3),
        request(
            pipeline, seed=4, negative_prompt="blurry", sampler="dpmpp_2m", guidance_rescale=0.7
        ),
        request(pipeline, seed=5, sampler="heun", num_inference_steps=3, **image),
    ]


def worst_difference(left: np.ndarray, right: np.ndarray) -> int:
    """Return the largest difference between two uint8 images, in grey levels."""
    return int(np.abs(left.astype(int) - right.astype(int)).max())


def test_a_mixed_batch_gives_each_row_what_it_gives_alone(
    pipeline: Pipeline, init_image: str
) -> None:
    requests = mixed_requests(pipeline, init_image)
    together = pipeline.render(requests).pixels
    for one, pixels in zip(requests, together, strict=True):
        alone = pipeline.render([one]).pixels[0]
        assert worst_difference(pixels, alone) <= 1
        assert pixels.std() > 3
    assert worst_difference(together[0], together[1]) > 20


def test_all_samplers_share_a_batch(pipeline: Pipeline) -> None:
    requests = [
        request(pipeline, sampler=sampler, seed=seed, num_inference_steps=3 + seed % 4)
        for seed, sampler in enumerate(SAMPLERS)
    ]
    for one, pixels in zip(requests, pipeline.render(requests).pixels, strict=True):
        assert worst_difference(pixels, pipeline.render([one]).pixels[0]) <= 1


def test_sequential_guidance_equals_batched(tiny_sdxl: Path, init_image: str) -> None:
    batched = load_pipeline(str(tiny_sdxl), device="cpu")
    sequential = load_pipeline(str(tiny_sdxl), device="cpu")
    sequential.profile = replace(sequential.profile, guidance="sequential")
    requests = mixed_requests(batched, init_image)
    pairs = zip(batched.render(requests).pixels, sequential.render(requests).pixels, strict=True)
    assert max(worst_difference(left, right) for left, right in pairs) <= 1


def test_stages_are_separate_and_equal_render(pipeline: Pipeline) -> None:
    requests = [request(pipeline), request(pipeline, seed=2)]
    embeds = pipeline.encode(requests)
    latents = pipeline.denoise(requests, embeds)
    assert latents.shape == (2, 4, 8, 8)
    assert latents.dtype == torch.float32
    pixels = pipeline.decode(latents)
    assert pixels.shape == (2, 64, 64, 3)
    assert np.array_equal(pixels, np.stack(pipeline.render(requests).pixels))


def test_each_distinct_text_is_encoded_once(pipeline: Pipeline) -> None:
    calls: list[int] = []
    encoder = pipeline.parts.text_encoders["text_encoder"]  # type: ignore[attr-defined]
    hook = encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    texts = ["never seen one", "never seen two", "never seen one"]
    requests = [request(pipeline, prompt=text, negative_prompt="never seen one") for text in texts]
    first = pipeline.encode(requests)
    again = pipeline.encode(requests)
    hook.remove()
    assert sum(calls) == 2
    assert torch.equal(first.prompt_embeds, again.prompt_embeds)
    assert torch.equal(first.prompt_embeds[0], first.negative_prompt_embeds[2])


def test_a_cut_prompt_is_a_warning_of_its_row_alone(pipeline: Pipeline) -> None:
    long = "very " * 200
    requests = [
        request(pipeline),
        request(pipeline, prompt=long),
        request(pipeline, negative_prompt=long),
        request(pipeline, prompt=long, negative_prompt=long),
        request(pipeline, negative_prompt=long, guidance_scale=1.0),  # not used, so not cut
    ]
    assert pipeline.render(requests).warnings == (
        None,
        "prompt cut to 77 tokens",
        "negative_prompt cut to 77 tokens",
        "prompt and negative_prompt cut to 77 tokens",
        None,
    )


def test_large_images_are_decoded_in_tiles(tiny_sd21: Path) -> None:
    pipeline = load_pipeline(str(tiny_sd21), device="cpu")
    latents = torch.randn(2, 4, 88, 120, generator=torch.Generator().manual_seed(0))
    whole = pipeline.decode(latents)
    pipeline.profile = replace(pipeline.profile, vae_tile_pixels=512 * 512)
    tiled = pipeline.decode(latents)
    assert tiled.shape == whole.shape == (2, 704, 960, 3)
    assert not np.array_equal(tiled, whole)
    assert (
        np.abs(tiled.astype(float) - whole).mean() < 4
    )  # of 255; the seams' own bound is the VAE's


def test_an_init_image_of_the_wrong_size_is_covered_and_cropped(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    wide = Image.new("RGB", (256, 64), "white")
    wide.paste("black", (96, 0, 160, 64))
    wide.save(tmp_path / "wide.png")
    wide.crop((96, 0, 160, 64)).save(tmp_path / "centre.png")
    rows = [
        request(pipeline, task="img2img", strength=0.5, init_image=str(tmp_path / f"{name}.png"))
        for name in ("wide", "centre")
    ]
    fitted, centre = pipeline.render(rows).pixels
    assert worst_difference(fitted, centre) <= 1


def test_bfloat16_on_the_cpu_stays_near_float32(tiny_sd21: Path) -> None:
    exact = load_pipeline(str(tiny_sd21), device="cpu")
    rough = load_pipeline(str(tiny_sd21), device="cpu", dtype="bfloat16")
    assert (exact.dtype_name, rough.dtype_name) == ("float32", "bfloat16")
    one = request(exact, guidance_scale=2.0)
    difference = np.abs(exact.render([one]).pixels[0].astype(float) - rough.render([one]).pixels[0])
    assert 0 < difference.mean() < 8


def test_a_gpu_profile_without_a_gpu_is_refused(
    tiny_sd21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="no GPU is visible"):
        load_pipeline(str(tiny_sd21), device="cpu", profile="gpu_poor")
    memory = MemoryConfig.model_validate({"devices": {"vae": "cuda"}})
    with pytest.raises(ConfigError, match="no GPU is visible"):
        load_pipeline(str(tiny_sd21), device="cpu", memory=memory)


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = make_tiny("sd21", tmp_path / "model")
    vocabulary = folder / "tokenizer" / "vocab.json"
    entries = vocabulary.read_text()
    more = ", ".join(f'"made up {i}": {100_000 + i}' for i in range(10))
    vocabulary.write_text(entries.rstrip().rstrip("}") + f", {more}}}")
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="different checkpoints"):
        load_pipeline(str(folder), device="cpu")


def test_compiled_equals_eager(
    tiny_sd21: Path, init_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile

    def compile_without_codegen(model: object, **options: object) -> object:
        return compile_(model, backend="aot_eager", **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", compile_without_codegen)
    eager = load_pipeline(str(tiny_sd21), device="cpu")
    compiled = load_pipeline(str(tiny_sd21), device="cpu", config=ModelConfig(compile=True))
    requests = mixed_requests(eager, init_image)
    pairs = zip(eager.render(requests).pixels, compiled.render(requests).pixels, strict=True)
    assert max(worst_difference(left, right) for left, right in pairs) <= 1
