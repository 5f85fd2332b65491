"""The miniatures' autoencoder, trained on drawn scenes: error, edge error and a little KL."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raydiff.mini.divergence import divergence
from raydiff.mini.draw import draw
from raydiff.mini.optimise import Optimiser, autocast
from raydiff.mini.recipe import LATENT_SIZE, AutoencoderRecipe
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, sample

ENCODE_BATCH = 512
WHITEN_SCENES = 16_384


def train_autoencoder(
    recipe: AutoencoderRecipe,
    tables: NDArray[np.float32],
    device: torch.device,
    log: Callable[[str], None],
) -> AutoencoderKL:
    """Train from nothing and return it with channels of mean 0 and variance 1 over the scenes."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(recipe.config)).to(device)
    vae.requires_grad_(True)
    scenes = torch.from_numpy(tables).to(device)
    is_compiled = device.type == "cuda"
    draw_scenes = torch.compile(draw) if is_compiled else draw
    loss_from = torch.compile(_loss) if is_compiled else _loss
    noise_shape = (recipe.batch_size, vae.config.latent_channels, LATENT_SIZE, LATENT_SIZE)

    def loss_of() -> Tensor:
        rows = torch.randint(len(scenes), (recipe.batch_size,), device=device)
        noise = torch.randn(noise_shape, device=device)
        with torch.no_grad():
            pixels = draw_scenes(scenes[rows])
        with autocast(device):
            return loss_from(vae, pixels, noise, recipe.kl_weight, recipe.edge_weight)

    optimiser = Optimiser.of(recipe, vae, loss_of)
    optimiser.descend("autoencoder", log)
    vae.requires_grad_(False)
    _whiten(vae, scenes[:WHITEN_SCENES])
    return vae


def encode_scenes(vae: AutoencoderKL, tables: NDArray[np.float32], device: torch.device) -> Tensor:
    """Return the latents (N, 4, h, w) float16 of drawn scenes: the means of their posteriors."""
    scenes = torch.from_numpy(tables)
    means = [mean.half() for mean in _means(vae, scenes.to(device))]
    return torch.cat(means).contiguous()


def _loss(
    vae: AutoencoderKL, pixels: Tensor, noise: Tensor, kl_weight: float, edge_weight: float
) -> Tensor:
    moments = vae.encode(pixels)
    mean, logvar = moments.mean.float(), moments.logvar.float()
    decoded = vae.decode(sample(type(moments)(mean, logvar), noise)).float()
    error = (decoded - pixels).abs().mean()
    edges = sum((decoded.diff(dim=dim) - pixels.diff(dim=dim)).abs().mean() for dim in (-1, -2))
    return (
        error
        + edge_weight * edges
        + F.mse_loss(decoded, pixels)
        + kl_weight * divergence(mean, logvar)
    )


@torch.no_grad()
def _means(vae: AutoencoderKL, scenes: Tensor) -> Iterator[Tensor]:
    for chunk in torch.split(scenes, ENCODE_BATCH):
        with autocast(chunk.device):
            mean = vae.encode(draw(chunk)).mean
        yield mean.float()


@torch.no_grad()
def _whiten(vae: AutoencoderKL, scenes: Tensor) -> None:
    """Put each channel's mean and deviation into the 1x1 convolutions at the latents."""
    latents = torch.cat(list(_means(vae, scenes)))
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    if encode is None or decode is None or encode.bias is None or decode.bias is None:
        raise ValueError("whitening needs quant_conv and post_quant_conv")
    count = len(mean)
    encode.weight[:count] /= deviation[:, None, None, None]
    encode.bias[:count] = (encode.bias[:count] - mean) / deviation
    encode.bias[count:] -= 2 * deviation.log()  # the log variance
    decode.bias += (decode.weight[:, :, 0, 0] * mean).sum(dim=1)
    decode.weight *= deviation[None, :, None, None]
