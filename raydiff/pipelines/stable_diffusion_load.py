"""Load a Stable Diffusion checkpoint: SD 2.1 or SDXL."""

from typing import Any

from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.memory.profiles import Profile
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from raydiff.models.unet import UNet, UNetConfig
from raydiff.pipelines.loading import Loading, check_tokenizer, is_on_gpu
from raydiff.pipelines.sdxl import SDXLPipeline
from raydiff.pipelines.stable_diffusion import Components, StableDiffusionPipeline
from raydiff.tokenizer import CLIPTokenizer
from raydiff.weights.checkpoint import Checkpoint

FAMILIES: dict[str, type[StableDiffusionPipeline]] = {
    "sd21": StableDiffusionPipeline,
    "sdxl": SDXLPipeline,
}


def load_stable_diffusion(loading: Loading) -> StableDiffusionPipeline:
    """Load what the stages need of the checkpoint."""
    checkpoint = loading.checkpoint
    text_encoders = {
        name: encoder
        for name in checkpoint.components
        if name.startswith("text_encoder")
        and (encoder := loading.load(name, _text_encoder)) is not None
    }
    components = Components(
        unet=loading.load("unet", lambda config: UNet(UNetConfig.from_dict(config))),
        vae=loading.load("vae", _vae, dtype=loading.vae_dtype),
        text_encoders=text_encoders,
        tokenizers={
            name: _tokenizer(checkpoint, name, encoder) for name, encoder in text_encoders.items()
        },
        schedule=ScheduleConfig.from_dict(checkpoint.config("scheduler")),
        has_zero_negative=bool(
            checkpoint.config("model_index").get("force_zeros_for_empty_prompt", False)
        ),
    )
    prepare(components, loading.profile)
    return FAMILIES[loading.info.family](
        info=loading.info,
        profile=loading.profile,
        components=components,
        dtype=loading.dtype,
        vae_dtype=loading.vae_dtype,
        is_compiled=loading.config.compile,
    )


def prepare(components: Components, profile: Profile) -> None:
    """Fuse projections, and order memory as the device that computes wants it."""
    for encoder in components.text_encoders.values():
        encoder.prepare_for_inference()
    if components.unet is not None:
        components.unet.prepare_for_inference(channels_last=is_on_gpu("unet", profile))
    if components.vae is not None:
        components.vae.prepare_for_inference(channels_last=is_on_gpu("vae", profile))


def _text_encoder(config: dict[str, Any]) -> CLIPTextEncoder:
    return CLIPTextEncoder(CLIPTextConfig.from_dict(config))


def _vae(config: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL(AutoencoderKLConfig.from_dict(config))


def _tokenizer(checkpoint: Checkpoint, name: str, encoder: CLIPTextEncoder) -> CLIPTokenizer:
    folder = checkpoint.tokenizer_folder(name)
    tokenizer = CLIPTokenizer.from_folder(folder)
    config = encoder.config
    sizes = {
        "tokens": (tokenizer.vocab_size, config.vocab_size),
        "positions": (tokenizer.max_length, config.max_position_embeddings),
    }
    check_tokenizer(folder, name, sizes)
    return tokenizer
