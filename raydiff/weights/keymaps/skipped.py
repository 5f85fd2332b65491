"""Tensors that checkpoints carry and no module of ours needs: {pattern of the name: reason}."""

POSITION_IDS = "the numbers 0..76, which the text encoder counts itself"
SCHEDULE = "training schedule, computed from scheduler_config.json instead"
TRAINING = "used in training only"

FP8_MARKER = "says that the file is in fp8, which the tensors' own dtypes say too"

SKIPPED_IN_FOLDERS: dict[str, str] = {
    r"(text_model\.)?embeddings\.position_ids": POSITION_IDS,
    r"(model\.)?(vision_tower|multi_modal_projector)\..*": "image half of Gemma 3",
    r"(language_model\.)?lm_head\.weight": "LTX-2 reads Gemma's hidden states, not its next token",
}

SKIPPED_IN_SINGLE_FILES: dict[str, str] = {
    r".*\.embeddings\.position_ids": POSITION_IDS,
    r"(model_ema\..*|model_ema)": "moving average of the UNet; the weights beside it are used",
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?": SCHEDULE,
    r"betas|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)": SCHEDULE,
    r"denoiser\.(sigmas|log_sigmas)": SCHEDULE,
    r"v_pred|ztsnr": "a marker without values, read when the scheduler is chosen",
    r"lvlb_weights|logvar|global_step|scale_factor": TRAINING,
    r"first_stage_model\.loss\..*": TRAINING,
    r".*\.logit_scale": "scale of the contrastive loss",
    r".*\.model\.attn_mask": "the causal mask, which the text encoder makes itself",
    r".*\.model\.visual\..*": "image tower of CLIP",
    r"conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?": (
        "SDXL pools with its second text encoder only"
    ),
    r"cond_stage_model\.model\.text_projection": "SD 2.x reads the hidden states, not the pooled",
    r"cond_stage_model\.model\.transformer\.resblocks\.23\..*": (
        "SD 2.x reads the 23rd layer's output, so the 24th never runs"
    ),
    r"vae\.per_channel_statistics\.(channel|mean-of-stds(_over_std-of-means)?)": TRAINING,
    r"(.*\.)?(scaled_fp8|comfy_quant)": FP8_MARKER,
}
