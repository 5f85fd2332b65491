"""The configs of LTX-2.0 and 2.3 as published in diffusers layout, and of their text encoder."""

from typing import Any, Literal

LTX2Version = Literal["2.0", "2.3"]

Config = dict[str, Any]

SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 1024,
    "base_shift": 0.95,
    "max_image_seq_len": 4096,
    "max_shift": 2.05,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.1,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}

GEMMA: Config = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1e6,
        "sliding_window": 1024,
        "layer_types": [
            "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(48)
        ],
    },
}
"""Gemma 3 12B, the language model alone."""

_TRANSFORMER: Config = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "attention_head_dim": 128,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_in_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "caption_channels": 3840,
    "cross_attention_dim": 4096,
    "cross_attn_timestep_scale_multiplier": 1000,
    "in_channels": 128,
    "norm_eps": 1e-6,
    "num_attention_heads": 32,
    "num_layers": 48,
    "out_channels": 128,
    "qk_norm": "rms_norm_across_heads",
    "rope_double_precision": True,
    "rope_type": "split",
    "timestep_scale_multiplier": 1000,
}

_CONNECTORS: Config = {
    "_class_name": "LTX2TextConnectors",
    "audio_connector_attention_head_dim": 128,
    "audio_connector_num_attention_heads": 30,
    "audio_connector_num_layers": 2,
    "audio_connector_num_learnable_registers": 128,
    "caption_channels": 3840,
    "connector_rope_base_seq_len": 4096,
    "rope_double_precision": True,
    "rope_type": "split",
    "text_proj_in_factor": 49,
    "video_connector_attention_head_dim": 128,
    "video_connector_num_attention_heads": 30,
    "video_connector_num_layers": 2,
    "video_connector_num_learnable_registers": 128,
}

_VAE: Config = {
    "_class_name": "AutoencoderKLLTX2Video",
    "block_out_channels": [256, 512, 1024, 2048],
    "decoder_block_out_channels": [256, 512, 1024],
    "decoder_causal": False,
    "decoder_inject_noise": [False] * 4,
    "decoder_layers_per_block": [5, 5, 5, 5],
    "decoder_spatial_padding_mode": "reflect",
    "decoder_spatio_temporal_scaling": [True] * 3,
    "down_block_types": ["LTX2VideoDownBlock3D"] * 4,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "encoder_causal": True,
    "encoder_spatial_padding_mode": "zeros",
    "latent_channels": 128,
    "layers_per_block": [4, 6, 6, 2, 2],
    "patch_size": 4,
    "scaling_factor": 1.0,
    "spatial_compression_ratio": 32,
    "spatio_temporal_scaling": [True] * 4,
    "temporal_compression_ratio": 8,
    "timestep_conditioning": False,
    "upsample_factor": [2, 2, 2],
    "upsample_residual": [True] * 3,
    "upsample_type": ["spatiotemporal"] * 3,
}

_AUDIO_VAE: Config = {
    "_class_name": "AutoencoderKLLTX2Audio",
    "base_channels": 128,
    "ch_mult": [1, 2, 4],
    "latent_channels": 8,
    "mel_bins": 64,
    "mel_hop_length": 160,
    "num_res_blocks": 2,
    "sample_rate": 16_000,
}

_VOCODER: Config = {
    "_class_name": "LTX2Vocoder",
    "hidden_channels": 1024,
    "in_channels": 128,
    "output_sampling_rate": 24_000,
    "resnet_dilations": [[1, 3, 5]] * 3,
    "resnet_kernel_sizes": [3, 7, 11],
    "upsample_factors": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
}

_UPSAMPLER: Config = {
    "_class_name": "LTX2LatentUpsamplerModel",
    "in_channels": 128,
    "mid_channels": 1024,
    "num_blocks_per_stage": 4,
}

PUBLISHED_LTX2: dict[LTX2Version, dict[str, Config]] = {
    "2.0": {
        "text_encoder": GEMMA,
        "connectors": _CONNECTORS,
        "transformer": _TRANSFORMER,
        "vae": _VAE,
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER,
        "latent_upsampler": _UPSAMPLER,
    },
    "2.3": {
        "text_encoder": GEMMA,
        "connectors": _CONNECTORS
        | {
            "audio_connector_attention_head_dim": 64,
            "audio_connector_num_attention_heads": 32,
            "audio_connector_num_layers": 8,
            "audio_gated_attn": True,
            "audio_hidden_dim": 2048,
            "per_modality_projections": True,
            "proj_bias": True,
            "video_connector_num_attention_heads": 32,
            "video_connector_num_layers": 8,
            "video_gated_attn": True,
            "video_hidden_dim": 4096,
        },
        "transformer": _TRANSFORMER
        | {
            "audio_cross_attn_mod": True,
            "audio_gated_attn": True,
            "cross_attn_mod": True,
            "gated_attn": True,
            "perturbed_attn": True,
            "use_prompt_embeddings": False,
        },
        "vae": _VAE
        | {
            "block_out_channels": [256, 512, 1024, 1024],
            "decoder_block_out_channels": [256, 512, 512, 1024],
            "decoder_inject_noise": [False] * 5,
            "decoder_layers_per_block": [4, 6, 4, 2, 2],
            "decoder_spatial_padding_mode": "zeros",
            "decoder_spatio_temporal_scaling": [True] * 4,
            "layers_per_block": [4, 6, 4, 2, 2],
            "upsample_factor": [2, 2, 1, 2],
            "upsample_residual": [False] * 4,
            "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
        },
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER
        | {
            "_class_name": "LTX2VocoderWithBWE",
            "act_fn": "snakebeta",
            "antialias": True,
            "bwe_act_fn": "snakebeta",
            "bwe_antialias": True,
            "bwe_final_act_fn": None,
            "bwe_final_bias": False,
            "bwe_hidden_channels": 512,
            "bwe_in_channels": 128,
            "bwe_out_channels": 2,
            "bwe_resnet_dilations": [[1, 3, 5]] * 3,
            "bwe_resnet_kernel_sizes": [3, 7, 11],
            "bwe_upsample_factors": [6, 5, 2, 2, 2],
            "bwe_upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "filter_length": 512,
            "final_act_fn": None,
            "final_bias": False,
            "hidden_channels": 1536,
            "hop_length": 80,
            "input_sampling_rate": 16_000,
            "num_mel_channels": 64,
            "output_sampling_rate": 48_000,
            "upsample_factors": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
            "window_length": 512,
        },
        "latent_upsampler": _UPSAMPLER | {"use_rational_resampler": False},
    },
}
"""By component."""
