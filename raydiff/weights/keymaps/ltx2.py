"""LTX-2: the names of Lightricks' single files, and transformers' spellings of Gemma 3, to ours.

One table serves 2.0 and 2.3: what a version lacks simply does not occur in its files.
"""

from raydiff.weights.keymaps.rules import Block, KeyMap, Parts

_ATTENTIONS = (
    "attn1",
    "attn2",
    "audio_attn1",
    "audio_attn2",
    "audio_to_video_attn",
    "video_to_audio_attn",
)


def _attention(name: str) -> dict[str, str]:
    return {name: name, f"{name}.q_norm": f"{name}.norm_q", f"{name}.k_norm": f"{name}.norm_k"}


_BLOCK: Parts = {
    **{theirs: ours for name in _ATTENTIONS for theirs, ours in _attention(name).items()},
    "ff": "ff",
    "audio_ff": "audio_ff",
    "scale_shift_table": "scale_shift_table",
    "audio_scale_shift_table": "audio_scale_shift_table",
    "prompt_scale_shift_table": "prompt_scale_shift_table",
    "audio_prompt_scale_shift_table": "audio_prompt_scale_shift_table",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
}

TRANSFORMER: KeyMap = {
    "patchify_proj": Block("proj_in"),
    "audio_patchify_proj": Block("audio_proj_in"),
    "keyframes_abs_pos_embedding": Block("keyframes_abs_pos_embedding"),
    "caption_projection": Block("caption_projection"),
    "audio_caption_projection": Block("audio_caption_projection"),
    "adaln_single": Block("time_embed"),
    "audio_adaln_single": Block("audio_time_embed"),
    "prompt_adaln_single": Block("prompt_adaln"),
    "audio_prompt_adaln_single": Block("audio_prompt_adaln"),
    "av_ca_video_scale_shift_adaln_single": Block("av_cross_attn_video_scale_shift"),
    "av_ca_audio_scale_shift_adaln_single": Block("av_cross_attn_audio_scale_shift"),
    "av_ca_a2v_gate_adaln_single": Block("av_cross_attn_video_a2v_gate"),
    "av_ca_v2a_gate_adaln_single": Block("av_cross_attn_audio_v2a_gate"),
    "transformer_blocks.{n}": Block("transformer_blocks.{n}", _BLOCK),
    "scale_shift_table": Block("scale_shift_table"),
    "audio_scale_shift_table": Block("audio_scale_shift_table"),
    "proj_out": Block("proj_out"),
    "audio_proj_out": Block("audio_proj_out"),
}

_CONNECTOR_BLOCK: Parts = {**_attention("attn1"), "ff": "ff"}


def _connector(name: str) -> KeyMap:
    return {
        "learnable_registers": Block(f"{name}.learnable_registers"),
        "transformer_1d_blocks.{n}": Block(f"{name}.transformer_blocks.{{n}}", _CONNECTOR_BLOCK),
    }


VIDEO_CONNECTOR: KeyMap = _connector("video_connector")
AUDIO_CONNECTOR: KeyMap = _connector("audio_connector")

TEXT_PROJECTIONS: KeyMap = {
    # 2.0 has one for both streams, 2.3 one for each.
    "aggregate_embed": Block("text_proj_in"),
    "video_aggregate_embed": Block("video_text_proj_in"),
    "audio_aggregate_embed": Block("audio_text_proj_in"),
}

_STATISTICS: KeyMap = {
    "per_channel_statistics.mean-of-means": Block("latents_mean"),
    "per_channel_statistics.std-of-means": Block("latents_std"),
}

_RESNETS: Parts = {"res_blocks": "resnets"}

VIDEO_VAE: KeyMap = {
    **_STATISTICS,
    "encoder.conv_in": Block("encoder.conv_in"),
    # The original numbers residual blocks and changes of size through.
    "encoder.down_blocks.0": Block("encoder.down_blocks.0", _RESNETS),
    "encoder.down_blocks.1": Block("encoder.down_blocks.0.downsamplers.0"),
    "encoder.down_blocks.2": Block("encoder.down_blocks.1", _RESNETS),
    "encoder.down_blocks.3": Block("encoder.down_blocks.1.downsamplers.0"),
    "encoder.down_blocks.4": Block("encoder.down_blocks.2", _RESNETS),
    "encoder.down_blocks.5": Block("encoder.down_blocks.2.downsamplers.0"),
    "encoder.down_blocks.6": Block("encoder.down_blocks.3", _RESNETS),
    "encoder.down_blocks.7": Block("encoder.down_blocks.3.downsamplers.0"),
    "encoder.down_blocks.8": Block("encoder.mid_block", _RESNETS),
    "encoder.conv_out": Block("encoder.conv_out"),
    "decoder.conv_in": Block("decoder.conv_in"),
    "decoder.up_blocks.0": Block("decoder.mid_block", _RESNETS),
    "decoder.up_blocks.1": Block("decoder.up_blocks.0.upsamplers.0"),
    "decoder.up_blocks.2": Block("decoder.up_blocks.0", _RESNETS),
    "decoder.up_blocks.3": Block("decoder.up_blocks.1.upsamplers.0"),
    "decoder.up_blocks.4": Block("decoder.up_blocks.1", _RESNETS),
    "decoder.up_blocks.5": Block("decoder.up_blocks.2.upsamplers.0"),
    "decoder.up_blocks.6": Block("decoder.up_blocks.2", _RESNETS),
    "decoder.up_blocks.7": Block("decoder.up_blocks.3.upsamplers.0"),
    "decoder.up_blocks.8": Block("decoder.up_blocks.3", _RESNETS),
    "decoder.conv_out": Block("decoder.conv_out"),
}

AUDIO_VAE: KeyMap = {**_STATISTICS, "encoder": Block("encoder"), "decoder": Block("decoder")}

_VOCODER_ACTIVATIONS: Parts = {
    f"{acts}.{n}.{theirs}": f"{acts}.{n}.{ours}"
    for acts in ("acts1", "acts2")
    for n in range(3)  # one for each dilation
    for theirs, ours in (
        ("act", "act"),
        ("upsample", "upsample"),
        ("downsample.lowpass", "downsample"),
    )
}

_VOCODER_RESNET: Parts = {"convs1": "convs1", "convs2": "convs2", **_VOCODER_ACTIVATIONS}


def _vocoder(prefix: str) -> KeyMap:
    return {
        f"{prefix}conv_pre": Block(f"{prefix}conv_in"),
        f"{prefix}ups.{{n}}": Block(f"{prefix}upsamplers.{{n}}"),
        f"{prefix}resblocks.{{n}}": Block(f"{prefix}resnets.{{n}}", _VOCODER_RESNET),
        f"{prefix}act_post": Block(
            f"{prefix}act_out",
            {"act": "act", "upsample": "upsample", "downsample.lowpass": "downsample"},
        ),
        f"{prefix}conv_post": Block(f"{prefix}conv_out"),
    }


VOCODER: KeyMap = {
    **_vocoder(""),
    # 2.3 has two networks, and the tables of the spectrogram between them.
    **_vocoder("vocoder."),
    **_vocoder("bwe_generator."),
    "mel_stft": Block("mel_stft"),
}

GEMMA3: KeyMap = {
    "language_model.model": Block(""),
    # transformers 5 as it runs, the language model saved alone, and without its prefix.
    "model.language_model": Block(""),
    "model": Block(""),
    "embed_tokens": Block("embed_tokens"),
    "layers": Block("layers"),
    "norm": Block("norm"),
}
