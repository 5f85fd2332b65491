"""What mini-ltx2 is made of and how it is trained: architectures in the words of the published
checkpoints' own config files, numbers of steps, batch sizes, seeds."""

from dataclasses import dataclass
from typing import Any

from raydiff.mini.ltx2.draw import HOP_LENGTH, SAMPLE_RATE
from raydiff.mini.ltx2.scenes import CANVAS, NUM_FRAMES

MAX_TOKENS = 24
"""Captions have up to 16, bos included; the connectors fill the rest with registers."""
MEL_BINS = 24
WIDTH, AUDIO_WIDTH, TEXT_WIDTH = 96, 48, 48

VIDEO_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLLTX2Video",
    "latent_channels": 24,
    "patch_size": 4,
    "block_out_channels": [32, 32],
    "layers_per_block": [1, 1, 1],
    "downsample_type": ["spatiotemporal", "spatiotemporal"],
    "decoder_block_out_channels": [24, 48],
    "decoder_layers_per_block": [1, 1, 1],
    "upsample_type": ["spatiotemporal", "spatiotemporal"],
    "upsample_factor": [1, 2],
    "upsample_residual": [True, True],
    "decoder_causal": False,
    "decoder_spatial_padding_mode": "zeros",
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
}
LATENT_SIZE = ((NUM_FRAMES - 1) // 4 + 1, CANVAS // 16, CANVAS // 16)

AUDIO_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLLTX2Audio",
    "base_channels": MEL_BINS,
    "ch_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "latent_channels": 4,
    "mel_bins": MEL_BINS,
    "sample_rate": SAMPLE_RATE,
    "mel_hop_length": HOP_LENGTH,
}
NUM_AUDIO_TOKENS = 27

VOCODER: dict[str, Any] = {
    "_class_name": "LTX2Vocoder",
    "in_channels": 2 * MEL_BINS,
    "hidden_channels": 80,
    "upsample_kernel_sizes": [16, 16, 9],
    "upsample_factors": [8, 8, 5],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 3]],
    "output_sampling_rate": SAMPLE_RATE,
}

GEMMA: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": MAX_TOKENS,
    "layer_types": ["sliding_attention", "full_attention"],
}

CONNECTORS: dict[str, Any] = {
    "_class_name": "LTX2TextConnectors",
    "rope_type": "split",
    "rope_theta": 100.0,
    "connector_rope_base_seq_len": MAX_TOKENS,
    "caption_channels": TEXT_WIDTH,
    "text_proj_in_factor": GEMMA["num_hidden_layers"] + 1,
    **{
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in {
            "num_attention_heads": 4,
            "attention_head_dim": TEXT_WIDTH // 4,
            "num_layers": 1,
            "num_learnable_registers": MAX_TOKENS,
        }.items()
    },
}

TRANSFORMER: dict[str, Any] = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "in_channels": VIDEO_VAE["latent_channels"],
    "out_channels": VIDEO_VAE["latent_channels"],
    "num_attention_heads": 4,
    "attention_head_dim": WIDTH // 4,
    "cross_attention_dim": WIDTH,
    "audio_in_channels": AUDIO_VAE["base_channels"],
    "audio_out_channels": AUDIO_VAE["base_channels"],
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": AUDIO_WIDTH // 4,
    "audio_cross_attention_dim": AUDIO_WIDTH,
    "num_layers": 4,
    "caption_channels": TEXT_WIDTH,
    "rope_type": "split",
    # Of a small picture and two seconds, where the published models span 2048 pixels and 20.
    "rope_theta": 100.0,
    "base_height": CANVAS,
    "base_width": CANVAS,
    "pos_embed_max_pos": 4,
    "audio_pos_embed_max_pos": 4,
    "vae_scale_factors": [4, 16, 16],
    "audio_sampling_rate": SAMPLE_RATE,
    "audio_hop_length": HOP_LENGTH,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One network's training."""

    num_steps: int
    batch_size: int
    learning_rate: float
    seed: int
    warmup_steps: int = 200
    ema_decay: float = 0.999


NUM_CLIPS = 20_000
"""For the autoencoders and the vocoder."""
NUM_CAPTIONED = 8_000
"""The first of them, for what learns from captions."""
CAPTIONS_PER_CLIP = 4
DATA_SEED = 30_000
KL_WEIGHT = 1e-7
"""Of a sum over a clip's latents. Ten times as much leaves noise of a quarter of their size, and
blurred corners."""

STILLS_TRAINING = Training(num_steps=6_000, batch_size=16, learning_rate=1.5e-3, seed=0)
VIDEO_VAE_TRAINING = Training(num_steps=7_000, batch_size=4, learning_rate=1.5e-3, seed=0)
AUDIO_VAE_TRAINING = Training(num_steps=6_000, batch_size=8, learning_rate=2e-3, seed=1)
VOCODER_TRAINING = Training(num_steps=4_500, batch_size=8, learning_rate=2e-3, seed=2)
DENOISER_TRAINING = Training(
    num_steps=5_500, batch_size=32, learning_rate=1e-3, seed=3, warmup_steps=300
)
