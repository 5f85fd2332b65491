"""Train mini-ltx2 from nothing: clips, the autoencoders of picture and sound, the vocoder, then
text encoder, connectors and transformer together."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from raydiff.mini.ltx2 import recipe
from raydiff.mini.ltx2.dataset import make_clips
from raydiff.mini.ltx2.recipe import Training
from raydiff.mini.ltx2.save import save_clip_miniature, save_clip_tokenizer
from raydiff.mini.ltx2.train_audio import encode_sounds, train_audio_vae, train_vocoder
from raydiff.mini.ltx2.train_denoiser import Texts, train_clip_denoiser
from raydiff.mini.ltx2.train_video_vae import encode_clips, train_video_vae


def train_clips(
    folder: Path, *, scale: float, device: torch.device, log: Callable[[str], None]
) -> None:
    """Write the pipeline folder; `scale` shortens everything (clips, steps) for a quick try."""

    def scaled(training: Training) -> Training:
        return replace(training, num_steps=max(1, int(training.num_steps * scale)))

    tokenizer = save_clip_tokenizer(folder)
    clips = make_clips(max(1, int(recipe.NUM_CLIPS * scale)))
    log(f"{len(clips.tables):,} clips")
    stills, moving = scaled(recipe.STILLS_TRAINING), scaled(recipe.VIDEO_VAE_TRAINING)
    vae = train_video_vae(stills, moving, clips.tables, device, log)
    audio_vae = train_audio_vae(scaled(recipe.AUDIO_VAE_TRAINING), clips.tables, device, log)
    vocoder = train_vocoder(scaled(recipe.VOCODER_TRAINING), clips.tables, device, log)
    captioned = clips.first(max(1, int(recipe.NUM_CAPTIONED * scale)))
    video = encode_clips(vae, captioned.tables, device)
    audio = encode_sounds(audio_vae, captioned.tables, device)
    log("clips encoded")
    denoiser = train_clip_denoiser(
        scaled(recipe.DENOISER_TRAINING),
        video=video.to(device),
        audio=audio.to(device),
        texts=Texts.of(tokenizer, captioned.captions, device),
        labels=captioned.labels.to(device),
        vocab_size=tokenizer.vocab_size,
        log=log,
    )
    save_clip_miniature(folder, vae=vae, audio_vae=audio_vae, vocoder=vocoder, denoiser=denoiser)
