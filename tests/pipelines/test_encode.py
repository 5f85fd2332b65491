"""Encoding: a text's embedding does not depend on what it is encoded with, or where it is sent."""

import pickle
from pathlib import Path

import pytest
import torch

from raydiff.errors import ConfigError, RowError
from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.request import RenderRequest

TEXTS = ("a lighthouse", "", "red " * 100, "two dogs on a photo", "the cat, 5 of them!")


def request(pipeline: Pipeline, prompt: str, negative_prompt: str | None = None) -> RenderRequest:
    return RenderRequest(
        model=pipeline.info.name,
        model_revision=pipeline.info.revision,
        task="txt2img",
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=1,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=7.5,
        guidance_rescale=0.0,
        sampler="ddim",
    )


def are_equal(left: EncodedPrompt, right: EncodedPrompt) -> bool:
    """Whether two encodings are the same, bit by bit."""
    pairs = [(left.embeds, right.embeds)]
    if left.pooled is not None and right.pooled is not None:
        pairs.append((left.pooled, right.pooled))
    return (
        left.is_truncated == right.is_truncated
        and (left.pooled is None) == (right.pooled is None)
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    )


@pytest.fixture(scope="module", params=["tiny_sd21", "tiny_sdxl"])
def folder(request: pytest.FixtureRequest) -> str:
    """Return each family's tiny checkpoint."""
    return str(request.getfixturevalue(request.param))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_together_and_in_another_order_are_bit_equal(folder: str, dtype: str) -> None:
    pipeline = load_pipeline(folder, device="cpu", dtype=dtype, stages=["encode"])  # type: ignore[arg-type]
    alone = {text: pipeline.encode_texts([text])[0] for text in TEXTS}
    assert alone["red " * 100].is_truncated
    assert not torch.equal(alone["a lighthouse"].embeds, alone[""].embeds)
    for order in (TEXTS, TEXTS[::-1], TEXTS * 9):
        for text, encoded in zip(order, pipeline.encode_texts(order), strict=True):
            assert are_equal(encoded, alone[text])
            assert str(encoded.embeds.dtype) == f"torch.{dtype}"


def test_what_is_sent_is_what_encode_gives(folder: str) -> None:
    whole = load_pipeline(folder, device="cpu")
    encoders = load_pipeline(folder, device="cpu", stages=["encode"])
    negatives = (None, "", "blurry")
    rows = [request(whole, prompt, negative) for prompt in TEXTS for negative in negatives]
    sent = dict(zip((*TEXTS, "blurry"), encoders.encode_texts((*TEXTS, "blurry")), strict=True))
    arrived = pickle.loads(pickle.dumps(sent))
    for ours, theirs in zip(whole.encode(rows), whole.gather(rows, arrived), strict=True):
        if isinstance(ours, torch.Tensor):
            assert isinstance(theirs, torch.Tensor)
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


def test_sent_tensors_take_nothing_else_along(tiny_sdxl: Path) -> None:
    encoders = load_pipeline(str(tiny_sdxl), device="cpu", stages=["encode"])
    (encoded, *_) = encoders.encode_texts(TEXTS)
    assert encoded.pooled is not None
    assert encoded.nbytes == 4 * (77 * 64 + 32)
    for tensor in (encoded.embeds, encoded.pooled):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_row_without_its_embeddings_is_a_row_error(tiny_sd21: Path) -> None:
    pipeline = load_pipeline(str(tiny_sd21), device="cpu", stages=["denoise"])
    with pytest.raises(RowError, match='embeddings of "a lighthouse" did not come'):
        pipeline.gather([request(pipeline, "a lighthouse")], {})


def test_stages_have_only_the_weights_they_use(tiny_sdxl: Path) -> None:
    loaded = {
        stage: set(load_pipeline(str(tiny_sdxl), device="cpu", stages=[stage]).parts.modules)  # type: ignore[attr-defined]
        for stage in ("encode", "denoise", "decode")
    }
    assert loaded == {
        "encode": {"text_encoder", "text_encoder_2"},
        "denoise": {"unet", "vae"},
        "decode": {"vae"},
    }


def test_a_stage_that_was_not_asked_for_is_refused(tiny_sd21: Path) -> None:
    decoder = load_pipeline(str(tiny_sd21), device="cpu", stages=["decode"])
    encoders = load_pipeline(str(tiny_sd21), device="cpu", stages=["encode"])
    rows = [request(decoder, "a lighthouse")]
    embeds = encoders.encode(rows)
    with pytest.raises(ConfigError, match=r"encode: this pipeline has only vae\. Load it with"):
        decoder.encode(rows)
    with pytest.raises(ConfigError, match="denoise: this pipeline has only vae"):
        decoder.denoise(rows, embeds)
    with pytest.raises(ConfigError, match="decode: this pipeline has only text_encoder"):
        encoders.decode(torch.zeros(1, 4, 8, 8))


def test_some_stages_without_a_gpu_are_cpu_only(
    tiny_sd21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pipeline = load_pipeline(str(tiny_sd21), device="cpu", profile="balanced", stages=["encode"])
    assert pipeline.profile.name == "cpu_only"
