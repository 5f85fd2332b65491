"""Load an LTX-2 checkpoint: a folder in diffusers layout, or one of Lightricks' single files."""

from typing import Any

import torch

from raydiff.diffusion.flow_match import FlowMatchConfig
from raydiff.errors import ConfigError, ModelError
from raydiff.gemma_tokenizer import MAX_LENGTH, GemmaTokenizer
from raydiff.memory.profiles import Profile
from raydiff.models.fp8_linear import use_fp8_linears
from raydiff.models.gemma3 import Gemma3Config, Gemma3TextEncoder
from raydiff.models.ltx2.audio_vae import AudioVAEConfig
from raydiff.models.ltx2.connectors import LTX2ConnectorsConfig
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.vocoder import build_vocoder
from raydiff.pipelines.loading import Loading, check_tokenizer, is_on_gpu
from raydiff.pipelines.ltx2.components import LTX2Components
from raydiff.pipelines.ltx2.modules import (
    build_audio_vae,
    build_connectors,
    build_text_encoder,
    build_transformer,
    build_upsampler,
    build_vae,
)
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.pipelines.text_backends import FeatureSpec, TextBackend, text_backend
from raydiff.weights.fp8 import fp8_layers


def load_ltx2(loading: Loading) -> LTX2Pipeline:
    """Load what the stages need of the checkpoint; `ltx2.text_encoder` says whether Gemma is.

    Raises ConfigError where Gemma is asked for and the checkpoint has none.
    """
    checkpoint, vae_dtype = loading.checkpoint, loading.vae_dtype
    connectors_config = LTX2ConnectorsConfig.from_dict(checkpoint.config("connectors"))
    text_encoder = _text_encoder(loading, connectors_config)
    tokenizer = None if text_encoder is None else _tokenizer(loading, text_encoder)
    components = LTX2Components(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        connectors=loading.load("connectors", build_connectors),
        transformer=_transformer(loading, "transformer"),
        refine_transformer=_transformer(loading, "refine_transformer"),
        vae=loading.load("vae", build_vae, dtype=vae_dtype),
        latent_upsampler=loading.load("latent_upsampler", build_upsampler, dtype=vae_dtype),
        audio_vae=loading.load("audio_vae", build_audio_vae, dtype=vae_dtype),
        # In bfloat16 its sound is audibly worse.
        vocoder=loading.load("vocoder", build_vocoder, dtype=torch.float32),
        audio_config=AudioVAEConfig.from_dict(checkpoint.config("audio_vae")),
        schedule=FlowMatchConfig.from_dict(checkpoint.config("scheduler")),
        num_text_embeds=_num_text_embeds(loading, tokenizer),
    )
    prepare(components, loading.profile)
    return LTX2Pipeline(
        info=loading.info,
        components=components,
        profile=loading.profile,
        dtype=loading.dtype,
        texts=_texts(loading, components, connectors_config),
        is_compiled=loading.config.compile,
    )


def prepare(components: LTX2Components, profile: Profile) -> None:
    """Fuse projections, and order memory as the device that computes wants it."""
    for fused in (
        components.text_encoder,
        components.connectors,
        components.transformer,
        components.refine_transformer,
    ):
        if fused is not None:
            fused.prepare_for_inference()
    for name, ordered in (
        ("vae", components.vae),
        ("latent_upsampler", components.latent_upsampler),
    ):
        if ordered is not None and is_on_gpu(name, profile):
            ordered.prepare_for_inference()


def _text_encoder(loading: Loading, connectors: LTX2ConnectorsConfig) -> Gemma3TextEncoder | None:
    has_own = "text_encoder" in loading.checkpoint.components
    if "encode" not in loading.stages or loading.ltx2.text_encoder != "gemma3":
        return None
    if not has_own:
        raise ConfigError(
            f"{loading.info.name}: ltx2.text_encoder is gemma3, and the checkpoint has no "
            "text_encoder. Put Gemma 3's folder there, with its tokenizer's beside it, or set "
            "ltx2.text_encoder to precomputed or api."
        )
    config = Gemma3Config.from_dict(loading.checkpoint.config("text_encoder"))
    for what, has, takes in (
        ("channels", config.hidden_size, connectors.hidden_size),
        ("hidden states", config.num_hidden_states, connectors.num_hidden_states),
    ):
        if has != takes:
            raise ModelError(
                f"{loading.checkpoint.path}: its text_encoder has {has} {what}, its connectors "
                f"take {takes}. Put the Gemma 3 there that LTX-2 was trained with: 12B."
            )
    return loading.load("text_encoder", build_text_encoder)


def _tokenizer(loading: Loading, encoder: Gemma3TextEncoder) -> GemmaTokenizer:
    folder = loading.checkpoint.tokenizer_folder("text_encoder")
    tokenizer = GemmaTokenizer.from_folder(folder)
    sizes = {"tokens": (tokenizer.vocab_size, encoder.config.vocab_size)}
    check_tokenizer(folder, "text_encoder", sizes)
    return tokenizer


def _num_text_embeds(loading: Loading, tokenizer: GemmaTokenizer | None) -> int:
    """Return what the tokenizer pads to, where its texts are encoded elsewhere too."""
    if tokenizer is not None:
        return tokenizer.max_length
    folder = loading.checkpoint.local_tokenizer_folder("text_encoder")
    return MAX_LENGTH if folder is None else GemmaTokenizer.max_length_of(folder)


def _texts(
    loading: Loading, components: LTX2Components, connectors: LTX2ConnectorsConfig
) -> TextBackend | None:
    if "encode" not in loading.stages:
        return None
    spec = FeatureSpec(
        revision=loading.info.revision,
        num_channels=connectors.num_features,
        max_tokens=components.num_text_embeds,
        dtype=loading.dtype,
    )
    return text_backend(loading.ltx2, spec)


def _transformer(loading: Loading, component: str) -> LTX2Transformer | None:
    def build(config: dict[str, Any]) -> LTX2Transformer:
        transformer = build_transformer(config)
        use_fp8_linears(transformer, fp8_layers(loading.checkpoint.tensors(component)))
        return transformer

    return loading.load(component, build)
