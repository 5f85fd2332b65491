"""Training, a few steps of it: what it writes is a pipeline like any other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import raydiff
from raydiff.bench.mini import request_of
from raydiff.bench.mini_clips import clip_request_of, render_clips
from raydiff.errors import ModelError, OutputError
from raydiff.mini import train as training
from raydiff.mini.dataset import make_dataset
from raydiff.mini.ltx2 import recipe as clip_recipe
from raydiff.mini.ltx2.dataset import make_clips
from raydiff.mini.ltx2.draw import HOP_LENGTH, NUM_MEL_FRAMES, SAMPLE_RATE
from raydiff.mini.ltx2.save import save_clip_tokenizer
from raydiff.mini.ltx2.scenes import CANVAS, NUM_FRAMES
from raydiff.mini.ltx2.train_audio import encode_sounds, train_audio_vae
from raydiff.mini.ltx2.train_denoiser import ClipDenoiser, Texts, train_clip_denoiser
from raydiff.mini.ltx2.train_video_vae import encode_clips, train_video_vae
from raydiff.mini.optimise import Optimiser
from raydiff.mini.recipe import (
    FAMILIES,
    MAX_TOKENS,
    RECIPES,
    VAE,
    AutoencoderRecipe,
    MiniFamily,
)
from raydiff.mini.scenes import COLORS
from raydiff.mini.slots import Slots
from raydiff.mini.train_autoencoder import encode_scenes, train_autoencoder
from raydiff.mini.train_denoiser import Denoiser, train_denoiser
from raydiff.mini.vocabulary import words
from raydiff.pipelines.base import Pipeline
from raydiff.request import RenderRequest
from raydiff.tokenizer import write_tiny_tokenizer

CPU = torch.device("cpu")
SMALL_VAE = replace(AutoencoderRecipe(), num_steps=2, batch_size=2)


def request(pipeline: Pipeline, prompt: str) -> RenderRequest:
    return request_of(pipeline.info, prompt, 1, num_inference_steps=2, guidance_scale=4.0)


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_a_miniature_trains_and_renders(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "AutoencoderRecipe", lambda: SMALL_VAE)
    recipe = replace(RECIPES[family], num_steps=2, batch_size=2)  # type: ignore[index]
    monkeypatch.setitem(RECIPES, family, recipe)
    monkeypatch.setattr(training, "NUM_SCENES", 16)
    (folder,) = training.train(tmp_path, [family], log=lambda text: None)  # type: ignore[list-item]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5_000_000
    pipeline = raydiff.load_pipeline(str(folder))
    assert pipeline.info.default_height == 128
    rendered = pipeline.render([request(pipeline, "a red circle")])
    assert rendered.pixels[0].shape == (128, 128, 3)
    with pytest.raises(OutputError, match="not empty"):
        training.train(tmp_path, [family])  # type: ignore[list-item]


def test_an_autoencoder_is_trained_once_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "AutoencoderRecipe", lambda: SMALL_VAE)
    monkeypatch.setattr(training, "NUM_SCENES", 16)
    recipe = replace(RECIPES["sdxl"], num_steps=2, batch_size=2)
    monkeypatch.setitem(RECIPES, "sdxl", recipe)
    shared = training.train_shared(tmp_path / "shared", log=lambda text: None)
    with pytest.raises(OutputError, match="not empty"):
        training.train_shared(shared)
    lines: list[str] = []
    (folder,) = training.train(tmp_path / "models", ["sdxl"], autoencoder=shared, log=lines.append)
    assert not any("autoencoder: step" in line for line in lines)
    weights = "diffusion_pytorch_model.safetensors"
    given, used = (load_file(one / weights) for one in (shared, folder / "vae"))
    assert given.keys() == used.keys()
    assert all(torch.equal(given[name], used[name]) for name in given)


def test_an_autoencoder_of_another_kind_is_refused(tmp_path: Path, tiny_sdxl: Path) -> None:
    with pytest.raises(ModelError, match="not the miniatures' autoencoder"):
        training.train(tmp_path / "models", ["sdxl"], autoencoder=tiny_sdxl / "vae")
    shutil.copytree(tiny_sdxl / "vae", tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text(json.dumps(VAE))
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(ModelError, match="weights cannot be read"):
        training.train(tmp_path / "models", ["sdxl"], autoencoder=tmp_path / "cut")
    assert not (tmp_path / "models").exists()


def random_slots(num_scenes: int) -> Slots:
    shape = (num_scenes, len(COLORS))
    return Slots(
        background=torch.randint(3, (num_scenes,)),
        counts=torch.randint(4, shape),
        shapes=torch.randint(4, shape),
        places=torch.randn(*shape, 3),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_denoiser_learns(family: MiniFamily) -> None:
    recipe = replace(RECIPES[family], num_steps=12, batch_size=8, warmup_steps=1)
    vocab_sizes = dict.fromkeys(recipe.text_encoders, 100)
    torch.manual_seed(recipe.seed)
    before = dict(Denoiser(recipe, vocab_sizes).named_parameters())
    ids = torch.randint(1, 98, (16, 2, MAX_TOKENS), dtype=torch.int16)
    ids[:, :, -1] = 99
    trained = train_denoiser(
        recipe,
        torch.randn(16, 4, 16, 16).half(),
        random_slots(16),
        dict.fromkeys(vocab_sizes, ids),
        dict.fromkeys(vocab_sizes, ids[0, 0]),
        vocab_sizes,
        lambda text: None,
    )
    still = {name for name, one in trained.named_parameters() if torch.equal(one, before[name])}
    # What comes after the layer that SDXL takes its embeddings from.
    unused = {name for name in still if family == "sdxl" and "text_encoders.text_encoder." in name}
    assert still == unused
    assert all("final_layer_norm" in name or ".layers.2." in name for name in unused)


def test_the_autoencoder_is_whitened_without_changing_its_pictures(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path / "tokenizer", "!", words(), MAX_TOKENS)
    tables = make_dataset(64, {"text_encoder": tmp_path / "tokenizer"}).tables
    vae = train_autoencoder(SMALL_VAE, tables, CPU, lambda text: None)
    latents = encode_scenes(vae, tables, CPU).float()
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.02)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.02)


def test_the_same_seed_gives_the_same_scenes_and_no_held_out_ones(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path / "tokenizer", "!", words(), MAX_TOKENS)
    first, second = (make_dataset(30, {"text_encoder": tmp_path / "tokenizer"}) for _ in range(2))
    assert np.array_equal(first.tables, second.tables)
    assert np.array_equal(first.input_ids["text_encoder"], second.input_ids["text_encoder"])
    assert first.input_ids["text_encoder"].shape == (30, 2, MAX_TOKENS)


def test_the_optimiser_finds_the_minimum_and_averages_the_way_there() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)
    target = torch.randn(4)
    inputs = torch.randn(256, 4)

    def loss_of() -> torch.Tensor:
        rows = torch.randint(256, (64,))
        return (layer(inputs[rows])[:, 0] - inputs[rows] @ target).square().mean()

    optimiser = Optimiser(
        layer, loss_of, learning_rate=0.05, warmup_steps=10, num_steps=600, ema_decay=0.9
    )
    losses = [optimiser.step().item() for _ in range(600)]
    assert losses[-1] < 1e-3 * losses[0]
    last = layer.weight.detach().clone()
    optimiser.load_average()
    assert not torch.equal(layer.weight, last)
    assert torch.allclose(layer.weight[0], target, atol=0.05)


def test_a_miniature_of_clips_trains_and_renders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STILLS", "VIDEO_VAE", "AUDIO_VAE", "VOCODER", "DENOISER"):
        schedule = replace(getattr(clip_recipe, f"{name}_TRAINING"), num_steps=2, batch_size=2)
        monkeypatch.setattr(clip_recipe, f"{name}_TRAINING", schedule)
    monkeypatch.setattr(clip_recipe, "NUM_CLIPS", 8)
    (folder,) = training.train(tmp_path, ["ltx2"], log=lambda text: None)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5_000_000
    pipeline = raydiff.load_pipeline(str(folder))
    asked = clip_request_of(pipeline.info, "a red circle going up", 1, num_inference_steps=2)
    ((frames, audio),) = render_clips(pipeline, [asked], 1)
    assert frames.shape == (NUM_FRAMES, CANVAS, CANVAS, 3)
    assert audio is not None
    assert audio.sample_rate == SAMPLE_RATE
    assert audio.samples.shape == (2, NUM_MEL_FRAMES * HOP_LENGTH)
    with pytest.raises(OutputError, match="not empty"):
        training.train(tmp_path, ["ltx2"])


def test_every_weight_of_a_denoiser_of_clips_learns(tmp_path: Path) -> None:
    clips = make_clips(16)
    tokenizer = save_clip_tokenizer(tmp_path)
    schedule = replace(clip_recipe.DENOISER_TRAINING, num_steps=12, batch_size=8, warmup_steps=1)
    torch.manual_seed(schedule.seed)
    before = dict(ClipDenoiser(tokenizer.vocab_size).named_parameters())
    trained = train_clip_denoiser(
        schedule,
        video=torch.randn(16, clip_recipe.VIDEO_VAE["latent_channels"], *clip_recipe.LATENT_SIZE),
        audio=torch.randn(16, clip_recipe.NUM_AUDIO_TOKENS, clip_recipe.MEL_BINS),
        texts=Texts.of(tokenizer, clips.captions, CPU),
        labels=clips.labels,
        vocab_size=tokenizer.vocab_size,
        log=lambda text: None,
    )
    still = {name for name, one in trained.named_parameters() if torch.equal(one, before[name])}
    assert not still


def test_latents_of_clips_are_normal(tmp_path: Path) -> None:
    tables = make_clips(32).tables
    schedule = replace(clip_recipe.STILLS_TRAINING, num_steps=2, batch_size=2)
    vae = train_video_vae(schedule, schedule, tables, CPU, lambda text: None)
    audio_vae = train_audio_vae(schedule, tables, CPU, lambda text: None)
    video = encode_clips(vae, tables, CPU).float()
    audio = encode_sounds(audio_vae, tables, CPU).float()
    assert video.shape[2:] == clip_recipe.LATENT_SIZE
    assert audio.shape[1:] == (clip_recipe.NUM_AUDIO_TOKENS, clip_recipe.MEL_BINS)
    for latents, dims in ((video, (0, 2, 3, 4)), (audio, (0, 1))):
        assert torch.allclose(latents.mean(dim=dims), torch.zeros(24), atol=0.02)
        assert torch.allclose(latents.std(dim=dims), torch.ones(24), atol=0.02)
    pixels = vae.decode(vae.denormalize(video))
    assert pixels.shape == (32, 3, NUM_FRAMES, CANVAS, CANVAS)
