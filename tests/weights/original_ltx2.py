"""Tensor names and shapes of Lightricks' LTX-2 single files, derived from the loops of the original
networks (ltx-core), and the config in their metadata; not from our tables."""

import json
from pathlib import Path
from typing import Any

from tests.weights.original import Shapes, linear, under, write_random

Blocks = list[tuple[str, dict[str, Any]]]

TRANSFORMER_20: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 128,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "audio_positional_embedding_max_pos": [20],
    "av_ca_timestep_scale_multiplier": 1000.0,
    "av_cross_ada_norm": True,
    "caption_channels": 3840,
    "causal_temporal_positioning": True,
    "connector_attention_head_dim": 128,
    "connector_norm_output": True,
    "connector_num_attention_heads": 30,
    "connector_num_layers": 2,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
    "cross_attention_dim": 4096,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "frequencies_precision": "float64",
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 32,
    "num_layers": 48,
    "out_channels": 128,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_middle_indices_grid": True,
}
TRANSFORMER_23: dict[str, Any] = {
    **TRANSFORMER_20,
    "apply_gated_attention": True,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_attention_heads": 32,
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "connector_apply_gated_attention": True,
    "connector_num_attention_heads": 32,
    "connector_num_layers": 8,
    "cross_attention_adaln": True,
    "text_encoder_norm_type": "per_token_rms",
}

VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "causal_decoder": False,
    "dims": 3,
    "in_channels": 3,
    "latent_channels": 128,
    "latent_log_var": "uniform",
    "norm_layer": "pixel_norm",
    "out_channels": 3,
    "patch_size": 4,
    "scaling_factor": 1.0,
}
VAE_20: dict[str, Any] = {
    **VAE,
    "timestep_conditioning": True,
    "encoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
    ],
    "decoder_blocks": [
        ["res_x", {"inject_noise": False, "num_layers": 5}],
        *[
            ["compress_all", {"multiplier": 2, "residual": True}],
            ["res_x", {"inject_noise": False, "num_layers": 5}],
        ]
        * 3,
    ],
}
VAE_23: dict[str, Any] = {
    **VAE,
    "timestep_conditioning": False,
    "encoder_base_channels": 128,
    "decoder_base_channels": 128,
    "spatial_padding_mode": "zeros",
    "encoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 4}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time", {"multiplier": 2}],
        ["res_x", {"num_layers": 4}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}],
        ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
    ],
}

AUDIO_VAE: dict[str, Any] = {
    "model": {
        "params": {
            "ddconfig": {
                "attn_resolutions": [],
                "causality_axis": "height",
                "ch": 128,
                "ch_mult": [1, 2, 4],
                "double_z": True,
                "dropout": 0.0,
                "in_channels": 2,
                "mel_bins": 64,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "num_res_blocks": 2,
                "out_ch": 2,
                "resolution": 256,
                "z_channels": 8,
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
    },
}

_RESBLOCKS = {
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "resblock_kernel_sizes": [3, 7, 11],
    "stereo": True,
}
VOCODER_20: dict[str, Any] = {
    **_RESBLOCKS,
    "resblock": "1",
    "upsample_initial_channel": 1024,
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "upsample_rates": [6, 5, 2, 2, 2],
}
_AMP = {
    **_RESBLOCKS,
    "activation": "snakebeta",
    "resblock": "AMP1",
    "use_bias_at_final": False,
    "use_tanh_at_final": False,
}
VOCODER_23: dict[str, Any] = {
    "vocoder": {
        **_AMP,
        "upsample_initial_channel": 1536,
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        "upsample_rates": [5, 2, 2, 2, 2, 2],
    },
    "bwe": {
        **_AMP,
        "apply_final_activation": False,
        "hop_length": 80,
        "input_sampling_rate": 16000,
        "n_fft": 512,
        "num_mels": 64,
        "output_sampling_rate": 48000,
        "upsample_initial_channel": 512,
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "upsample_rates": [6, 5, 2, 2, 2],
        "win_size": 512,
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    "2.0": {
        "transformer": TRANSFORMER_20,
        "vae": VAE_20,
        "audio_vae": AUDIO_VAE,
        "vocoder": VOCODER_20,
    },
    "2.3": {
        "transformer": TRANSFORMER_23,
        "vae": VAE_23,
        "audio_vae": AUDIO_VAE,
        "vocoder": VOCODER_23,
    },
}
"""The `config` of ltx-2-19b-dev and ltx-2.3-22b-dev, by version."""

GEMMA_STATES = 49


def small_config(version: str) -> dict[str, Any]:
    """The same networks, two blocks deep and a few channels wide."""
    config = json.loads(json.dumps(CONFIGS[version]))
    config["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "caption_channels": 20,
        "num_layers": 2,
        "connector_num_attention_heads": 2,
        "connector_attention_head_dim": 16 if version == "2.3" else 10,
        "connector_num_layers": 1,
        "connector_num_learnable_registers": 4,
    }
    if version == "2.3":
        config["transformer"] |= {
            "audio_connector_num_attention_heads": 2,
            "audio_connector_attention_head_dim": 8,
        }
    config["vae"] |= {
        "latent_channels": 16,
        "patch_size": 2,
        "encoder_base_channels": 16,
        "decoder_base_channels": 8,
    }
    config["audio_vae"]["model"]["params"]["ddconfig"] |= {"ch": 8, "z_channels": 2, "mel_bins": 16}
    vocoders = [config["vocoder"]]
    if version == "2.3":
        vocoders = list(config["vocoder"].values())
    for section in vocoders:
        section["upsample_initial_channel"] = 64
    return config


def ltx2_shapes(config: dict[str, Any]) -> Shapes:
    """A whole single file, with the statistics of the video VAE that nobody reads."""
    return {
        **under("model.diffusion_model", transformer_shapes(config["transformer"])),
        **connectors_shapes(config["transformer"]),
        **under("vae", video_vae_shapes(config["vae"])),
        **under("audio_vae", audio_vae_shapes(config["audio_vae"]["model"]["params"]["ddconfig"])),
        **under("vocoder", vocoder_shapes(config["vocoder"])),
    }


def metadata(config: dict[str, Any], version: str) -> dict[str, str]:
    """The metadata of a single file."""
    return {"config": json.dumps(config), "model_version": version}


def transformer_shapes(config: dict[str, Any]) -> Shapes:
    """LTXModel: two streams, and what stands between them."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    audio = config["audio_num_attention_heads"] * config["audio_attention_head_dim"]
    has_modulation = config.get("cross_attention_adaln", False)
    num_rows = 9 if has_modulation else 6
    shapes: Shapes = {"scale_shift_table": (2, dim), "audio_scale_shift_table": (2, audio)}
    for prefix, width in (("", dim), ("audio_", audio)):
        shapes |= linear(f"{prefix}patchify_proj", config["in_channels"], width)
        shapes |= linear(f"{prefix}proj_out", width, config["out_channels"])
        shapes |= _adaln(f"{prefix}adaln_single", width, num_rows)
        if not config.get("caption_proj_before_connector"):
            shapes |= linear(f"{prefix}caption_projection.linear_1", _caption(config), width)
            shapes |= linear(f"{prefix}caption_projection.linear_2", width, width)
        if has_modulation:
            shapes |= _adaln(f"{prefix}prompt_adaln_single", width, 2)
    shapes |= _adaln("av_ca_video_scale_shift_adaln_single", dim, 4)
    shapes |= _adaln("av_ca_audio_scale_shift_adaln_single", audio, 4)
    shapes |= _adaln("av_ca_a2v_gate_adaln_single", dim, 1)
    shapes |= _adaln("av_ca_v2a_gate_adaln_single", audio, 1)
    for index in range(config["num_layers"]):
        block = _transformer_block(config, dim, audio, num_rows)
        shapes |= under(f"transformer_blocks.{index}", block)
    return shapes


def _caption(config: dict[str, Any]) -> int:
    width: int = config["caption_channels"]
    return width


def _transformer_block(config: dict[str, Any], dim: int, audio: int, num_rows: int) -> Shapes:
    heads = config["num_attention_heads"] if config.get("apply_gated_attention") else None
    shapes = {
        **_attention("attn1", dim, dim, dim, heads),
        **_attention("audio_attn1", audio, audio, audio, heads),
        **_attention("attn2", dim, dim, dim, heads),
        **_attention("audio_attn2", audio, audio, audio, heads),
        **_attention("audio_to_video_attn", dim, audio, audio, heads),
        **_attention("video_to_audio_attn", audio, dim, audio, heads),
        **_feed_forward("ff", dim),
        **_feed_forward("audio_ff", audio),
        "scale_shift_table": (num_rows, dim),
        "audio_scale_shift_table": (num_rows, audio),
        "scale_shift_table_a2v_ca_video": (5, dim),
        "scale_shift_table_a2v_ca_audio": (5, audio),
    }
    if config.get("cross_attention_adaln"):
        shapes["prompt_scale_shift_table"] = (2, dim)
        shapes["audio_prompt_scale_shift_table"] = (2, audio)
    return shapes


def _attention(name: str, query: int, source: int, inner: int, heads: int | None) -> Shapes:
    return {
        **linear(f"{name}.to_q", query, inner),
        **linear(f"{name}.to_k", source, inner),
        **linear(f"{name}.to_v", source, inner),
        f"{name}.q_norm.weight": (inner,),
        f"{name}.k_norm.weight": (inner,),
        **linear(f"{name}.to_out.0", inner, query),
        **(linear(f"{name}.to_gate_logits", query, heads) if heads else {}),
    }


def _feed_forward(name: str, dim: int) -> Shapes:
    return linear(f"{name}.net.0.proj", dim, 4 * dim) | linear(f"{name}.net.2", 4 * dim, dim)


def _adaln(name: str, dim: int, num_rows: int) -> Shapes:
    return {
        **linear(f"{name}.emb.timestep_embedder.linear_1", 256, dim),
        **linear(f"{name}.emb.timestep_embedder.linear_2", dim, dim),
        **linear(f"{name}.linear", dim, num_rows * dim),
    }


def connectors_shapes(config: dict[str, Any]) -> Shapes:
    """Embeddings1DConnector, twice, and the projection of Gemma's states before them."""
    states = GEMMA_STATES * _caption(config)
    video = config["connector_num_attention_heads"] * config["connector_attention_head_dim"]
    audio = video
    shapes: Shapes = {}
    if config.get("caption_proj_before_connector"):
        audio = (
            config["audio_connector_num_attention_heads"]
            * config["audio_connector_attention_head_dim"]
        )
        for stream, width in (("video", video), ("audio", audio)):
            shapes |= linear(f"text_embedding_projection.{stream}_aggregate_embed", states, width)
    else:
        name = "text_embedding_projection.aggregate_embed.weight"
        shapes[name] = (_caption(config), states)
    gates = "connector_apply_gated_attention"
    heads = config["connector_num_attention_heads"] if config.get(gates) else None
    for stream, width in (("video", video), ("audio", audio)):
        name = f"model.diffusion_model.{stream}_embeddings_connector"
        num_registers = config["connector_num_learnable_registers"]
        shapes[f"{name}.learnable_registers"] = (num_registers, width)
        for index in range(config["connector_num_layers"]):
            block = f"{name}.transformer_1d_blocks.{index}"
            shapes |= _attention(f"{block}.attn1", width, width, width, heads)
            shapes |= _feed_forward(f"{block}.ff", width)
    return shapes


def video_vae_shapes(config: dict[str, Any]) -> Shapes:
    """CausalVideoAutoencoder; the decoder's blocks run from the last to the first."""
    latents, folded = config["latent_channels"], config["patch_size"] ** 2 * 3
    shapes: Shapes = {
        f"per_channel_statistics.{name}": (latents,)
        for name in (
            "channel",
            "mean-of-means",
            "mean-of-stds",
            "mean-of-stds_over_std-of-means",
            "std-of-means",
        )
    }
    width = config.get("encoder_base_channels", 128)
    shapes |= _conv3d("encoder.conv_in", folded, width)
    for index, (name, options) in enumerate(config["encoder_blocks"]):
        block = f"encoder.down_blocks.{index}"
        if name == "res_x":
            shapes |= _res_blocks(block, width, options["num_layers"])
        else:
            wider = width * options["multiplier"]
            shapes |= _conv3d(f"{block}.conv", width, wider // _folds(name))
            width = wider
    shapes |= _conv3d("encoder.conv_out", width, latents + 1)
    width = config.get("decoder_base_channels", 128)
    for _, options in config["decoder_blocks"]:
        width *= options.get("multiplier", 1)
    shapes |= _conv3d("decoder.conv_in", latents, width)
    for index, (name, options) in enumerate(reversed(config["decoder_blocks"])):
        block = f"decoder.up_blocks.{index}"
        if name == "res_x":
            shapes |= _res_blocks(block, width, options["num_layers"])
        else:
            narrower = width // options["multiplier"]
            shapes |= _conv3d(f"{block}.conv", width, narrower * _folds(name))
            width = narrower
    return shapes | _conv3d("decoder.conv_out", width, folded)


def _folds(name: str) -> int:
    """Pixels or frames that a change of size takes together."""
    return {"space": 4, "time": 2, "all": 8}[name.split("_")[1]]


def _res_blocks(name: str, width: int, count: int) -> Shapes:
    shapes: Shapes = {}
    for index in range(count):
        for conv in ("conv1", "conv2"):
            shapes |= _conv3d(f"{name}.res_blocks.{index}.{conv}", width, width)
    return shapes


def _conv3d(name: str, inner: int, outer: int) -> Shapes:
    return {f"{name}.conv.weight": (outer, inner, 3, 3, 3), f"{name}.conv.bias": (outer,)}


def audio_vae_shapes(config: dict[str, Any]) -> Shapes:
    """The audio autoencoder, without attention."""
    width, mult, latents = config["ch"], config["ch_mult"], config["z_channels"]
    shapes: Shapes = {
        f"per_channel_statistics.{name}": (width,) for name in ("mean-of-means", "std-of-means")
    }
    shapes |= _conv2d("encoder.conv_in", config["in_channels"], width)
    inner = width
    for level, factor in enumerate(mult):
        for index in range(config["num_res_blocks"]):
            shapes |= _audio_resblock(f"encoder.down.{level}.block.{index}", inner, factor * width)
            inner = factor * width
        if level < len(mult) - 1:
            shapes |= _conv2d(f"encoder.down.{level}.downsample", inner, inner)
    shapes |= _audio_middle("encoder.mid", inner)
    shapes |= _conv2d("encoder.conv_out", inner, 2 * latents)
    shapes |= _conv2d("decoder.conv_in", latents, inner) | _audio_middle("decoder.mid", inner)
    for level, factor in reversed(list(enumerate(mult))):
        for index in range(config["num_res_blocks"] + 1):
            shapes |= _audio_resblock(f"decoder.up.{level}.block.{index}", inner, factor * width)
            inner = factor * width
        if level:
            shapes |= _conv2d(f"decoder.up.{level}.upsample.conv", inner, inner)
    return shapes | _conv2d("decoder.conv_out", inner, config["out_ch"])


def _audio_middle(name: str, width: int) -> Shapes:
    blocks = (_audio_resblock(f"{name}.block_{n}", width, width) for n in (1, 2))
    return next(blocks) | next(blocks)


def _audio_resblock(name: str, inner: int, outer: int) -> Shapes:
    shortcut = _conv2d(f"{name}.nin_shortcut", inner, outer, 1) if inner != outer else {}
    convs = _conv2d(f"{name}.conv1", inner, outer) | _conv2d(f"{name}.conv2", outer, outer)
    return convs | shortcut


def _conv2d(name: str, inner: int, outer: int, kernel: int = 3) -> Shapes:
    return {
        f"{name}.conv.weight": (outer, inner, kernel, kernel),
        f"{name}.conv.bias": (outer,),
    }


def vocoder_shapes(config: dict[str, Any]) -> Shapes:
    """Vocoder, or two of them with the tables of a spectrogram between."""
    if "bwe" not in config:
        return _vocoder(config)
    num_mels, size = config["bwe"]["num_mels"], config["bwe"]["n_fft"]
    num_frequencies = size // 2 + 1
    basis = (2 * num_frequencies, 1, size)
    return {
        **under("vocoder", _vocoder(config["vocoder"])),
        **under("bwe_generator", _vocoder(config["bwe"])),
        "mel_stft.mel_basis": (num_mels, num_frequencies),
        "mel_stft.stft_fn.forward_basis": basis,
        "mel_stft.stft_fn.inverse_basis": basis,
    }


def _vocoder(config: dict[str, Any]) -> Shapes:
    width, number = config["upsample_initial_channel"], 0
    is_snake = config.get("activation") == "snakebeta"
    shapes = _conv1d("conv_pre", 128, width, 7)
    sizes = config["upsample_kernel_sizes"]
    for index, size in enumerate(sizes):
        shapes |= {f"ups.{index}.weight": (width, width // 2, size)}
        width //= 2
        shapes |= {f"ups.{index}.bias": (width,)}
        kernels = zip(
            config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True
        )
        for kernel, dilations in kernels:
            for part in range(len(dilations)):
                for half in "12":
                    block = f"resblocks.{number}"
                    shapes |= _conv1d(f"{block}.convs{half}.{part}", width, width, kernel)
                    if is_snake:
                        shapes |= _activation(f"{block}.acts{half}.{part}", width)
            number += 1
    if is_snake:
        shapes |= _activation("act_post", width)
    last = _conv1d("conv_post", width, 2, 7)
    if not config.get("use_bias_at_final", True):
        del last["conv_post.bias"]
    return shapes | last


def _activation(name: str, width: int) -> Shapes:
    return {
        f"{name}.act.alpha": (width,),
        f"{name}.act.beta": (width,),
        f"{name}.upsample.filter": (1, 1, 12),
        f"{name}.downsample.lowpass.filter": (1, 1, 12),
    }


def _conv1d(name: str, inner: int, outer: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outer, inner, kernel), f"{name}.bias": (outer,)}


def write_small(path: Path, version: str) -> dict[str, Any]:
    """Write a small single file with random tensors; return them."""
    config = small_config(version)
    return write_random(path, ltx2_shapes(config), metadata=metadata(config, version))
