"""LTX-2 folders and single files as resident pipelines: which components which stages load, where
texts come from, and in what the weights compute."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydiff.config import LTX2Config, ModelConfig
from raydiff.errors import ConfigError, ModelError
from raydiff.models.fp8_linear import Fp8Linear
from raydiff.output.rendered import Rendered
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.pipelines.quantize import quantize
from raydiff.pipelines.tiny import make_tiny
from tests.pipelines.tiny_ltx2 import clip_request
from tests.weights.original_ltx2 import write_small

SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "frame_rate": 25.0}


def load(folder: Path, **options: Any) -> LTX2Pipeline:
    pipeline = load_pipeline(str(folder), device="cpu", **options)
    assert isinstance(pipeline, LTX2Pipeline)
    return pipeline


def render(pipeline: LTX2Pipeline, seed: int = 1, **values: Any) -> Rendered:
    """Return one small guided clip of few steps."""
    merged = {**SIZE, "num_inference_steps": 3, **values}
    return pipeline.render([clip_request(pipeline, "a red cat", seed=seed, **merged)])


@pytest.mark.parametrize("name", ["tiny_ltx2", "tiny_ltx23"])
def test_a_tiny_checkpoint_makes_colourful_clips_with_sound(
    name: str, request: pytest.FixtureRequest
) -> None:
    pipeline = load(request.getfixturevalue(name))
    clips = [render(pipeline, seed) for seed in (1, 2)]
    for clip in clips:
        (frames,), (sound,) = clip.pixels, clip.audio
        assert (clip.errors, clip.warnings) == ((None,), (None,))
        assert frames.shape == (9, 64, 96, 3)
        assert frames.std() > 40
        assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 5
        assert sound is not None
        # The sound is as long as the frames but for a part of a latent, which is 40 ms.
        assert abs(sound.samples.shape[1] / sound.sample_rate - 9 / 25) < 0.04
        assert sound.samples.std() > 0.02
        assert np.abs(sound.samples).max() < 0.9
    assert np.abs(np.diff(np.stack([clip.pixels[0] for clip in clips]).astype(int), axis=0)).max()
    sounds = [clip.audio[0] for clip in clips]
    assert sounds[0] is not None
    assert sounds[1] is not None
    assert np.abs(sounds[0].samples - sounds[1].samples).max() > 0.01


def test_tiny_checkpoints_are_the_same_for_the_same_seed(tiny_ltx2: Path, tmp_path: Path) -> None:
    again, other = make_tiny("ltx2", tmp_path / "again"), make_tiny("ltx2", tmp_path / "other", 1)
    files = [path.relative_to(tiny_ltx2) for path in tiny_ltx2.rglob("*") if path.is_file()]
    assert all((again / name).read_bytes() == (tiny_ltx2 / name).read_bytes() for name in files)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (other / weights).read_bytes() != (tiny_ltx2 / weights).read_bytes()


def test_stages_load_what_they_use_and_give_what_they_give_together(tiny_ltx2: Path) -> None:
    whole = load(tiny_ltx2)
    encoder, denoiser, decoder = (
        load(tiny_ltx2, stages=(stage,)) for stage in ("encode", "denoise", "decode")
    )
    assert set(encoder.parts.modules) == {"text_encoder", "connectors"}
    assert set(denoiser.parts.modules) == {"transformer", "connectors", "vae", "latent_upsampler"}
    assert set(decoder.parts.modules) == {"vae", "audio_vae", "vocoder"}
    one = clip_request(whole, "a red cat", seed=1, num_inference_steps=2, **SIZE)
    texts = ["a red cat", ""]
    encoded = dict(zip(texts, encoder.encode_texts(texts), strict=True))
    (latents,) = denoiser.denoise_rows([one], denoiser.gather([one], encoded)).latents
    (expected,) = whole.denoise_rows([one], whole.encode([one])).latents
    assert torch.equal(latents.video, expected.video)
    assert torch.equal(latents.audio, expected.audio)
    apart, together = decoder.decode_rows([latents]), whole.decode_rows([expected])
    assert np.array_equal(apart.pixels[0], together.pixels[0])


def test_gemma_is_not_loaded_where_texts_come_from_elsewhere(
    tiny_ltx2: Path, tmp_path: Path
) -> None:
    elsewhere = LTX2Config(text_encoder="random")
    assert "text_encoder" not in load(tiny_ltx2, ltx2=elsewhere).parts.modules
    assert load(tiny_ltx2, ltx2=elsewhere, stages=("encode",)).parts.modules == {}
    folder = tmp_path / "without"
    shutil.copytree(tiny_ltx2, folder, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    index = json.loads((folder / "model_index.json").read_text())
    del index["text_encoder"], index["tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = load(folder, ltx2=elsewhere)
    assert pipeline.parts.num_text_embeds == 1024
    clip = render(pipeline, text_encoder="random", num_inference_steps=1)
    assert clip.errors == (None,)
    assert clip.warnings[0] is not None
    assert "its text was not read" in clip.warnings[0]
    with pytest.raises(ConfigError, match="is gemma3, and the checkpoint has no text_encoder"):
        load(folder)


def test_a_text_encoder_of_another_size_is_named(tiny_ltx2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_ltx2, tmp_path / "other")
    path = tmp_path / "other" / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="text_encoder has 3 hidden states, its connectors take 4"):
        load(tmp_path / "other")


def test_another_transformer_for_the_second_stage_stands_beside_the_first(
    tiny_ltx2: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "refined"
    shutil.copytree(tiny_ltx2, folder)
    other = make_tiny("ltx2", tmp_path / "other", seed=1)
    shutil.copytree(other / "transformer", folder / "refine_transformer")
    first, refined = load(tiny_ltx2), load(folder)
    assert "refine_transformer" in refined.parts.modules
    assert refined.info.revision != first.info.revision
    frames = []
    for pipeline in (first, refined):
        values = {**SIZE, "height": 64, "width": 128, "num_inference_steps": 1}
        one = clip_request(pipeline, "a red cat", "two_stage", seed=1, **values)
        frames.append(pipeline.render([one]).pixels[0].astype(int))
    assert np.abs(frames[0] - frames[1]).mean() > 1


def test_the_vocoder_computes_in_float32_and_autoencoders_in_the_vae_dtype(tiny_ltx2: Path) -> None:
    config = ModelConfig(dtype="bfloat16", vae_dtype="float32")
    parts = load(tiny_ltx2, config=config).parts
    dtypes = {
        name: {parameter.dtype for parameter in module.parameters()}
        for name, module in parts.modules.items()
    }
    whole = {"vae", "audio_vae", "latent_upsampler", "vocoder"}
    assert dtypes == {name: {torch.float32 if name in whole else torch.bfloat16} for name in dtypes}
    rough, exact = render(load(tiny_ltx2, dtype="bfloat16")), render(load(tiny_ltx2))
    assert rough.errors == (None,)
    assert np.abs(rough.pixels[0].astype(int) - exact.pixels[0]).mean() < 8


def test_an_fp8_copy_computes_in_fp8_and_takes_less_memory(tiny_ltx2: Path, tmp_path: Path) -> None:
    quantize(tiny_ltx2, tmp_path / "fp8")
    exact, rough = load(tiny_ltx2), load(tmp_path / "fp8")
    assert rough.parts.transformer is not None
    layers = [one for one in rough.parts.transformer.modules() if isinstance(one, Fp8Linear)]
    num_fp8 = sum(layer.weight.numel() for layer in layers)
    assert rough.info.num_fp8_parameters == {"transformer": num_fp8}
    assert exact.info.num_fp8_parameters == {"transformer": 0}
    assert num_fp8 > 0.4 * exact.info.num_parameters["transformer"]
    clips = [render(pipeline).pixels[0].astype(int) for pipeline in (exact, rough)]
    assert 0 < np.abs(clips[0] - clips[1]).mean() < 16


def test_compiled_blocks_make_the_same_clips(
    tiny_ltx2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile

    def compile_without_codegen(model: object, **options: object) -> object:
        return compile_(model, backend="aot_eager", **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", compile_without_codegen)
    eager, compiled = load(tiny_ltx2), load(tiny_ltx2, config=ModelConfig(compile=True))
    assert compiled.parts.transformer is not None
    blocks = compiled.parts.transformer.transformer_blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    one = clip_request(eager, "a red cat", seed=1, num_inference_steps=1, **SIZE)
    counters = torch._dynamo.utils.counters
    counters.clear()
    pixels, expected = (pipeline.render([one]).pixels[0] for pipeline in (compiled, eager))
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert not counters["graph_break"]
    # Of a block with a perturbed pass and one without: there are three, and all share these.
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_lightricks_single_files_are_loaded(tmp_path: Path, version: str) -> None:
    path = tmp_path / "ltx-2-19b-dev.safetensors"
    write_small(path, version)
    pipeline = load(path, ltx2=LTX2Config(text_encoder="random"))
    assert set(pipeline.parts.modules) == {
        "transformer", "connectors", "vae", "audio_vae", "vocoder"
    }  # fmt: skip
    assert all(
        not tensor.is_meta for one in pipeline.parts.modules.values() for tensor in one.parameters()
    )
    with pytest.raises(ConfigError, match="the checkpoint has no text_encoder"):
        load(path)
