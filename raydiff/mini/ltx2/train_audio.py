"""mini-ltx2's audio autoencoder and vocoder, trained on the clips' sounds."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raydiff.mini.divergence import divergence
from raydiff.mini.ltx2.draw import HOP_LENGTH, NUM_MEL_FRAMES, SAMPLE_RATE, draw_sounds
from raydiff.mini.ltx2.recipe import AUDIO_VAE, KL_WEIGHT, MEL_BINS, VOCODER, Training
from raydiff.mini.optimise import Optimiser, autocast
from raydiff.models.autoencoder_kl import Moments, sample
from raydiff.models.ltx2.audio_vae import AudioVAE
from raydiff.models.ltx2.mel import log_mel
from raydiff.models.ltx2.vocoder import Vocoder, build_vocoder
from raydiff.pipelines.ltx2.modules import build_audio_vae

ENCODE_BATCH = 64
MEL_ERROR = 0.1
"""Of a log-mel spectrogram that a vocoder is given in training: the autoencoder errs too."""
WINDOWS = (256, 1024)
"""Samples of the Fourier transforms whose magnitudes are compared."""


def mels(sounds: Tensor) -> Tensor:
    """(B, 2, samples) -> log-mel spectrograms (B, 2, NUM_MEL_FRAMES, MEL_BINS)."""
    spectra = log_mel(sounds, sample_rate=SAMPLE_RATE, hop_length=HOP_LENGTH, num_mels=MEL_BINS)
    return spectra[:, :, :NUM_MEL_FRAMES]


def train_audio_vae(
    training: Training, tables: Tensor, device: torch.device, log: Callable[[str], None]
) -> AudioVAE:
    """Train the spectrograms' autoencoder; its statistics are still to be set."""
    torch.manual_seed(training.seed)
    vae = build_audio_vae(AUDIO_VAE).to(device)
    vae.latents_mean.zero_()
    vae.latents_std.fill_(1)
    vae.requires_grad_(True)
    clips = tables.to(device)

    def loss_of() -> Tensor:
        rows = torch.randint(len(clips), (training.batch_size,), device=device)
        spectra = mels(draw_sounds(clips[rows]))
        with autocast(device):
            moments = vae.encode(spectra)
            mean, logvar = moments.mean.float(), moments.logvar.float()
            noise = torch.randn_like(mean)
            decoded = vae.decode(sample(Moments(mean, logvar), noise)).float()
        return F.l1_loss(decoded, spectra) + KL_WEIGHT * divergence(mean, logvar)

    Optimiser.of(training, vae, loss_of, is_captured=False).descend("audio vae", log)
    vae.requires_grad_(False)
    return vae


def train_vocoder(
    training: Training, tables: Tensor, device: torch.device, log: Callable[[str], None]
) -> Vocoder:
    """Train from spectrograms, a little wrong, to samples."""
    torch.manual_seed(training.seed)
    vocoder = build_vocoder(VOCODER).to(device)
    if not isinstance(vocoder, Vocoder):
        raise TypeError(f"the recipe's vocoder is a {type(vocoder).__name__}")
    vocoder.requires_grad_(True)
    clips = tables.to(device)

    def loss_of() -> Tensor:
        rows = torch.randint(len(clips), (training.batch_size,), device=device)
        sounds = draw_sounds(clips[rows])
        spectra = mels(sounds)
        made = vocoder(spectra + MEL_ERROR * torch.randn_like(spectra))
        apart = [F.l1_loss(_magnitudes(made, size), _magnitudes(sounds, size)) for size in WINDOWS]
        # Samples too: the tones always begin at the same phase.
        return F.l1_loss(made, sounds) + torch.stack(apart).sum()

    Optimiser.of(training, vocoder, loss_of, is_captured=False).descend("vocoder", log)
    vocoder.requires_grad_(False)
    return vocoder


@torch.no_grad()
def encode_sounds(vae: AudioVAE, tables: Tensor, device: torch.device) -> Tensor:
    """Set the autoencoder's statistics, and return the sounds' tokens (N, M, C) float16."""
    tokens = []
    for part in torch.split(tables, ENCODE_BATCH):
        with autocast(device):
            mean = vae.encode(mels(draw_sounds(part.to(device)))).mean.float()
        tokens.append(vae.pack(mean))
    raw = torch.cat(tokens)
    vae.latents_mean.copy_(raw.mean(dim=(0, 1)))
    vae.latents_std.copy_(raw.std(dim=(0, 1)))
    return vae.normalize(raw).half().cpu()


def _magnitudes(sounds: Tensor, size: int) -> Tensor:
    """Magnitudes (B * 2, frequencies, frames), a full tone's near 1."""
    window = torch.hann_window(size, device=sounds.device)
    spectrum = torch.stft(
        sounds.flatten(0, 1), size, hop_length=size // 4, window=window, return_complex=True
    )
    # Under the root a little: at 0 the gradient of a magnitude has no direction.
    power = spectrum.real.square() + spectrum.imag.square() + 1e-6
    return power.sqrt() / (size / 4)
