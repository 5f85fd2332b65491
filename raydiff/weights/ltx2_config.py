"""diffusers' configs of LTX-2's components, from the config that Lightricks' single files carry.

What a tensor's shape or presence shows is read from there: a config may name parts that its file
does not have.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from raydiff.errors import ModelError
from raydiff.weights.headers import TensorHeader, read_metadata
from raydiff.weights.published import Config, Sources, shape_of
from raydiff.weights.published_ltx2 import SCHEDULER

CONNECTOR_LENGTH = 4096
"""Positions that the connectors' rotary embedding spans in every published file; the original's
code takes 1 where a file does not say, which no published weights were trained with."""

SAME = (
    "activation_fn",
    "attention_bias",
    "attention_head_dim",
    "audio_attention_head_dim",
    "audio_cross_attention_dim",
    "audio_ff_bias",
    "audio_num_attention_heads",
    "audio_out_channels",
    "caption_channels",
    "cross_attention_dim",
    "ff_bias",
    "in_channels",
    "norm_elementwise_affine",
    "norm_eps",
    "num_attention_heads",
    "num_layers",
    "out_channels",
    "timestep_scale_multiplier",
    "use_keyframes_abs_pos_embedding",
    "use_prompt_adaln_single",
)
"""Options of the transformer under the same name."""

REQUIRED: Config = {
    "av_cross_ada_norm": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
"""Options of the transformer that diffusers has no name for: only these values can be run."""

RESIZES = {
    "compress_space": "spatial",
    "compress_time": "temporal",
    "compress_all": "spatiotemporal",
}


def ltx2_configs(path: Path, components: Mapping[str, Sources]) -> dict[str, Config]:
    """Return {component: config} of a single file, with `scheduler` and `model_index`.

    Raises ModelError for a file without its config, or for options that raydiff does not run.
    """
    sections = _sections(path)
    audio_vae = _read(path, "audio_vae", sections, _audio_vae)
    return {
        "model_index": {"_class_name": "LTX2Pipeline"},
        # The section in the file says nothing of shifts.
        "scheduler": dict(SCHEDULER),
        "connectors": _read(
            path, "transformer", sections, lambda s: _connectors(s, components["connectors"])
        ),
        "transformer": _read(
            path, "transformer", sections, lambda s: _transformer(path, s, audio_vae)
        ),
        "vae": _read(path, "vae", sections, lambda s: _video_vae(path, s)),
        "audio_vae": audio_vae,
        "vocoder": _read(path, "vocoder", sections, lambda s: _vocoder(s, components["vocoder"])),
    }


def upsampler_config(path: Path, header: Mapping[str, TensorHeader]) -> Config:
    """Return the config of a latent upsampler's single file, which its shapes tell whole."""
    try:
        width, in_channels = header["initial_conv.weight"].shape[:2]
        is_rational = "upsampler.blur_down.kernel" in header
        name = "upsampler.conv.weight" if is_rational else "upsampler.0.weight"
        shape = header[name].shape
    except (KeyError, ValueError):
        raise ModelError(f"{path}: not a latent upsampler of LTX-2; move it away") from None
    is_temporal = len(shape) == 5
    return {
        "_class_name": "LTX2LatentUpsamplerModel",
        "in_channels": in_channels,
        "mid_channels": width,
        "num_blocks_per_stage": _count(header, "res_blocks."),
        "spatial_upsample": not is_temporal or shape[0] == 8 * width,
        "temporal_upsample": is_temporal,
        "use_rational_resampler": is_rational,
    }


def _sections(path: Path) -> Config:
    text = read_metadata(path).get("config")
    if text is None:
        raise ModelError(
            f"{path}: its metadata has no `config`, which tells what no tensor's shape shows; "
            "download the file from Lightricks again: some tools that rewrite it drop the metadata"
        )
    try:
        sections = json.loads(text)
    except (ValueError, RecursionError):
        sections = None
    if not isinstance(sections, dict):
        raise ModelError(f"{path}: the `config` in its metadata is no JSON object; copy it again")
    return sections


def _read(path: Path, name: str, sections: Config, convert: Callable[[Config], Config]) -> Config:
    """Convert one section; whatever is missing or of another type in it is an error of the file."""
    try:
        return convert(sections[name])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{path}: the section {name!r} of the config in its metadata lacks {error}; "
            "download the file from Lightricks again"
        ) from None


def _transformer(path: Path, section: Config, audio_vae: Config) -> Config:
    for name, value in REQUIRED.items():
        if section.get(name, value) != value:
            raise ModelError(
                f"{path}: {name} of the transformer is {section[name]!r}; raydiff runs {value!r}. "
                "Use an LTX-2 file that this version supports"
            )
    max_frames, height, width = section.get("positional_embedding_max_pos", (20, 2048, 2048))
    (audio_max,) = section.get("audio_positional_embedding_max_pos", (20,))
    has_gates = section.get("apply_gated_attention", False)
    has_modulation = section.get("cross_attention_adaln", False)
    return {
        "_class_name": "LTX2VideoTransformer3DModel",
        **{name: section[name] for name in SAME if name in section},
        "audio_in_channels": section.get("audio_in_channels", 128),
        "audio_cross_attn_mod": has_modulation,
        "audio_gated_attn": has_gates,
        "audio_hop_length": audio_vae["mel_hop_length"],
        "audio_pos_embed_max_pos": audio_max,
        "audio_sampling_rate": audio_vae["sample_rate"],
        "base_height": height,
        "base_width": width,
        "cross_attn_mod": has_modulation,
        "cross_attn_timestep_scale_multiplier": section.get("av_ca_timestep_scale_multiplier", 1),
        "gated_attn": has_gates,
        "pos_embed_max_pos": max_frames,
        "qk_norm": "rms_norm_across_heads",
        "rope_double_precision": section.get("frequencies_precision") == "float64",
        "rope_theta": section.get("positional_embedding_theta", 10000.0),
        "rope_type": section.get("rope_type", "split"),
        "use_prompt_embeddings": not section.get("caption_proj_before_connector", False),
    }


def _connectors(section: Config, sources: Sources) -> Config:
    caption_channels = section["caption_channels"]
    has_projection_for_each = section.get("caption_proj_before_connector", False)
    projection = "video_text_proj_in" if has_projection_for_each else "text_proj_in"
    (length,) = section.get("connector_positional_embedding_max_pos", (CONNECTOR_LENGTH,))
    return {
        "_class_name": "LTX2TextConnectors",
        "caption_channels": caption_channels,
        "text_proj_in_factor": shape_of(sources, f"{projection}.weight")[1] // caption_channels,
        **_connector("video", "connector", section, sources),
        **_connector("audio", "audio_connector", section, sources),
        "connector_rope_base_seq_len": length,
        "rope_theta": section.get("positional_embedding_theta", 10000.0),
        "rope_double_precision": section.get("frequencies_precision") == "float64",
        "rope_type": section.get("rope_type", "split"),
        "per_modality_projections": has_projection_for_each,
        "video_hidden_dim": section["num_attention_heads"] * section["attention_head_dim"],
        "audio_hidden_dim": (
            section["audio_num_attention_heads"] * section["audio_attention_head_dim"]
        ),
        "proj_bias": f"{projection}.bias" in sources,
    }


def _connector(stream: str, theirs: str, section: Config, sources: Sources) -> Config:
    """One stream's connector; the audio's has the video's heads where nothing is said of it."""
    heads, head_dim = (
        section.get(f"{theirs}_{name}", section[f"connector_{name}"])
        for name in ("num_attention_heads", "attention_head_dim")
    )
    num_registers = shape_of(sources, f"{stream}_connector.learnable_registers")[0]
    return {
        f"{stream}_connector_num_attention_heads": heads,
        f"{stream}_connector_attention_head_dim": head_dim,
        f"{stream}_connector_num_layers": _count(
            sources, f"{stream}_connector.transformer_blocks."
        ),
        f"{stream}_connector_num_learnable_registers": num_registers,
        f"{stream}_gated_attn": section.get("connector_apply_gated_attention", False),
    }


def _video_vae(path: Path, section: Config) -> Config:
    if section.get("_class_name") != "CausalVideoAutoencoder":
        raise ModelError(
            f"{path}: its video decoder is a {section.get('_class_name')}; raydiff runs the "
            "convolutional one, CausalVideoAutoencoder. Use a file that has it"
        )
    encoder, decoder = (
        [(name, options) for name, options in section[f"{part}_blocks"]]
        for part in ("encoder", "decoder")
    )
    down = [(name, options) for name, options in encoder if name != "res_x"]
    up = [(name, options) for name, options in decoder if name != "res_x"]
    divisors = [options.get("multiplier", 2) for _, options in up]
    return {
        "_class_name": "AutoencoderKLLTX2Video",
        "in_channels": section["in_channels"],
        "out_channels": section["out_channels"],
        "latent_channels": section["latent_channels"],
        "block_out_channels": _widths(
            section.get("encoder_base_channels", 128),
            [options.get("multiplier", 2) for _, options in down],
        ),
        "down_block_types": ["LTX2VideoDownBlock3D"] * len(down),
        "spatio_temporal_scaling": [True] * len(down),
        "layers_per_block": [o["num_layers"] for name, o in encoder if name == "res_x"],
        "downsample_type": [RESIZES[name.removesuffix("_res")] for name, _ in down],
        "decoder_block_out_channels": _widths(section.get("decoder_base_channels", 128), divisors),
        "decoder_layers_per_block": [o["num_layers"] for name, o in decoder if name == "res_x"],
        "decoder_spatio_temporal_scaling": [True] * len(up),
        # diffusers lists the types in the order of execution, and all else against it.
        "upsample_type": [RESIZES[name] for name, _ in reversed(up)],
        "upsample_factor": divisors,
        "upsample_residual": [options.get("residual", False) for _, options in up],
        "decoder_inject_noise": [o.get("inject_noise", False) for n, o in decoder if n == "res_x"],
        # LTX-2.0 says that it is, and has no weights for it.
        "timestep_conditioning": False,
        "patch_size": section["patch_size"],
        "encoder_causal": True,
        "decoder_causal": section.get("causal_decoder", False),
        "encoder_spatial_padding_mode": section.get("encoder_spatial_padding_mode", "zeros"),
        "decoder_spatial_padding_mode": section.get("spatial_padding_mode", "reflect"),
        "scaling_factor": section.get("scaling_factor", 1.0),
    }


def _widths(width: int, factors: list[int]) -> list[int]:
    """The width after each of the changes of size, from the pixels' side on."""
    widths = []
    for factor in factors:
        width *= factor
        widths.append(width)
    return widths


def _audio_vae(section: Config) -> Config:
    params, stft = section["model"]["params"], section["preprocessing"]["stft"]
    network = params["ddconfig"]
    return {
        "_class_name": "AutoencoderKLLTX2Audio",
        "base_channels": network["ch"],
        "output_channels": network["out_ch"],
        "ch_mult": network["ch_mult"],
        "num_res_blocks": network["num_res_blocks"],
        "attn_resolutions": network.get("attn_resolutions") or None,
        "in_channels": network["in_channels"],
        "latent_channels": network["z_channels"],
        "norm_type": network["norm_type"],
        "causality_axis": network["causality_axis"],
        "mid_block_add_attention": network["mid_block_add_attention"],
        "sample_rate": params["sampling_rate"],
        "mel_hop_length": stft["hop_length"],
        "is_causal": stft.get("causal", True),
        "mel_bins": network.get("mel_bins") or section["preprocessing"]["mel"]["n_mel_channels"],
        "double_z": network["double_z"],
    }


def _vocoder(section: Config, sources: Sources) -> Config:
    if "bwe" not in section:
        return {
            "_class_name": "LTX2Vocoder",
            **_vocoder_network(section, sources, ""),
            "output_sampling_rate": section.get("output_sampling_rate", 24000),
        }
    bwe = section["bwe"]
    second = _vocoder_network(bwe, sources, "bwe_generator.")
    return {
        "_class_name": "LTX2VocoderWithBWE",
        **_vocoder_network(section["vocoder"], sources, "vocoder."),
        **{f"bwe_{name}": value for name, value in second.items()},
        "filter_length": bwe["n_fft"],
        "hop_length": bwe["hop_length"],
        "window_length": bwe["win_size"],
        "num_mel_channels": bwe["num_mels"],
        "input_sampling_rate": bwe["input_sampling_rate"],
        "output_sampling_rate": bwe["output_sampling_rate"],
    }


def _vocoder_network(section: Config, sources: Sources, prefix: str) -> Config:
    is_snake = section.get("activation") == "snakebeta"
    return {
        "in_channels": shape_of(sources, f"{prefix}conv_in.weight")[1],
        "hidden_channels": section["upsample_initial_channel"],
        "out_channels": shape_of(sources, f"{prefix}conv_out.weight")[0],
        "upsample_kernel_sizes": section["upsample_kernel_sizes"],
        "upsample_factors": section["upsample_rates"],
        "resnet_kernel_sizes": section["resblock_kernel_sizes"],
        "resnet_dilations": section["resblock_dilation_sizes"],
        "act_fn": "snakebeta" if is_snake else "leaky_relu",
        "antialias": is_snake,
        # As diffusers publishes it. Without tanh the original clamps to -1..1 here as well, which
        # it does once more at the end.
        "final_act_fn": "tanh" if section.get("use_tanh_at_final", True) else None,
        "final_bias": f"{prefix}conv_out.bias" in sources,
    }


def _count(names: Mapping[str, object], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
