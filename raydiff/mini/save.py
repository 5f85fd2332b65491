"""A trained miniature as a Hugging Face pipeline folder: half-precision safetensors and configs."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raydiff.errors import ModelError
from raydiff.mini.recipe import MAX_TOKENS, VAE, Recipe
from raydiff.mini.train_denoiser import Denoiser, encoder_config
from raydiff.mini.vocabulary import words
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.pipelines.save import save_component, save_index
from raydiff.tokenizer import write_tiny_tokenizer
from raydiff.weights.folder import read_json


def save_tokenizers(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Write the tokenizer of each text encoder below `folder`; return them by encoder."""
    folders = {
        name: folder / name.replace("text_encoder", "tokenizer") for name in recipe.text_encoders
    }
    for name, tokenizer in folders.items():
        write_tiny_tokenizer(tokenizer, recipe.pad_tokens[name], words(), MAX_TOKENS)
    return folders


def save_autoencoder(folder: Path, vae: AutoencoderKL) -> None:
    """Write the autoencoder alone, as a pipeline's folder `vae` has it."""
    save_component(folder, VAE, half(vae))


def load_autoencoder(folder: str | Path) -> AutoencoderKL:
    """Read what `save_autoencoder` wrote, in float32; ModelError for anything else."""
    folder = Path(folder)
    if read_json(folder / "config.json") != VAE:
        raise ModelError(f"{folder}: not the miniatures' autoencoder; `raydiff mini autoencoder`")
    try:
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: its weights cannot be read: {error}") from None
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(VAE))
    vae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return vae


def save_miniature(
    recipe: Recipe,
    folder: Path,
    vae: AutoencoderKL,
    denoiser: Denoiser,
    vocab_sizes: dict[str, int],
) -> None:
    """Write everything but the tokenizers, which training needed before."""
    configs = {name: encoder_config(recipe, name, vocab_sizes[name]) for name in vocab_sizes}
    save_component(folder / "vae", VAE, half(vae))
    save_component(folder / "unet", recipe.unet, half(denoiser.unet))
    for name, encoder in denoiser.text_encoders.items():
        save_component(folder / name, configs[name], half(encoder))
    save_index(folder, configs, recipe.scheduler, is_sdxl=recipe.has_zero_negative)


def half(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors by name, in half precision on the host."""
    return {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in module.state_dict().items()
    }
