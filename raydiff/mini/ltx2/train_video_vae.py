"""mini-ltx2's video autoencoder, trained on drawn clips: error, edge error and a little KL."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from raydiff.mini.divergence import divergence
from raydiff.mini.ltx2.draw import draw_clips, on_the_way
from raydiff.mini.ltx2.recipe import KL_WEIGHT, VIDEO_VAE, Training
from raydiff.mini.ltx2.scenes import NUM_FRAMES
from raydiff.mini.optimise import Optimiser, autocast
from raydiff.models.autoencoder_kl import Moments, sample
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.pipelines.ltx2.modules import build_vae

ENCODE_BATCH = 64
SQUARE_WEIGHT, EDGE_WEIGHT = 3.0, 1.0
"""Of squared error, which finds colours soon, and of the difference between neighbouring pixels'
differences, in a frame and from frame to frame, which keeps edges sharp; beside absolute error."""
FIRST_LOGVAR = -6.0
"""Where the posterior's variance begins: with 0, noise hides what the encoder has to say."""


def train_video_vae(
    stills: Training,
    clips: Training,
    tables: Tensor,
    device: torch.device,
    log: Callable[[str], None],
) -> LTX2VideoVAE:
    """Train from nothing on single frames, which cost a seventeenth, and then on whole clips; its
    statistics are still to be set."""
    torch.manual_seed(stills.seed)
    vae = build_vae(VIDEO_VAE).to(device)
    vae.requires_grad_(True)
    with torch.no_grad():
        cast(Tensor, vae.encoder.conv_out.conv.bias)[-1] = FIRST_LOGVAR
    everything = tables.to(device)

    def loss_of(training: Training, num_frames: int) -> Tensor:
        rows = torch.randint(len(everything), (training.batch_size,), device=device)
        some = everything[rows]
        if num_frames == 1:
            some = on_the_way(some, torch.rand(training.batch_size, device=device))
        with torch.no_grad():
            pixels = draw_clips(some, num_frames)
        with autocast(device):
            return _loss(vae, pixels)

    for name, training, num_frames in (("stills", stills, 1), ("clips", clips, NUM_FRAMES)):
        optimiser = Optimiser.of(training, vae, partial(loss_of, training, num_frames))
        optimiser.descend(f"video vae, {name}", log)
    vae.requires_grad_(False)
    return vae


@torch.no_grad()
def encode_clips(vae: LTX2VideoVAE, tables: Tensor, device: torch.device) -> Tensor:
    """Set the autoencoder's statistics, and return the clips' latents (N, C, f, h, w) float16."""
    means = []
    for part in torch.split(tables, ENCODE_BATCH):
        with autocast(device):
            means.append(vae.encode(draw_clips(part.to(device))).mean.float())
    raw = torch.cat(means)
    vae.latents_mean.copy_(raw.mean(dim=(0, 2, 3, 4)))
    vae.latents_std.copy_(raw.std(dim=(0, 2, 3, 4)))
    return vae.normalize(raw).half().contiguous().cpu()


def _loss(vae: LTX2VideoVAE, pixels: Tensor) -> Tensor:
    moments = vae.encode(pixels)
    mean, logvar = moments.mean.float(), moments.logvar.float()
    decoded = vae.decode(sample(Moments(mean, logvar), torch.randn_like(mean))).float()
    error = (decoded - pixels).abs().mean()
    axes = (-1, -2) if pixels.shape[2] == 1 else (-1, -2, -3)
    edges = sum((decoded.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean() for axis in axes)
    squares = F.mse_loss(decoded, pixels)
    kl = divergence(mean, logvar)
    return error + SQUARE_WEIGHT * squares + EDGE_WEIGHT * edges + KL_WEIGHT * kl
