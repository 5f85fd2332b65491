"""Tensor names and shapes of original checkpoints, derived from the original networks' own loops
(LDM's openaimodel.py and model.py, OpenCLIP's transformer.py), not from our tables."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]

SD21_UNET = {"channels": 320, "mult": (1, 2, 4, 4), "depth": (1, 1, 1, 0), "context": 1024}
SDXL_UNET = {
    "channels": 320,
    "mult": (1, 2, 4),
    "depth": (0, 2, 10),
    "context": 2048,
    "added": 2816,
}


def sd21_shapes(unet=SD21_UNET, vae_channels=128, width=1024, layers=24, vocab=49408) -> Shapes:
    """A whole SD 2.1 file."""
    text = open_clip_shapes(width, layers, projection=width, vocab=vocab)
    return {
        **under("model.diffusion_model", unet_shapes(**unet)),
        **under("first_stage_model", vae_shapes(vae_channels)),
        **under("cond_stage_model.model", text),
        **dict.fromkeys(("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod"), (1000,)),
    }


def sdxl_shapes(
    unet=SDXL_UNET, vae_channels=128, widths=(768, 1280), layers=(12, 32), vocab=49408
) -> Shapes:
    """A whole SDXL base file."""
    second = open_clip_shapes(widths[1], layers[1], projection=widths[1], vocab=vocab)
    return {
        **under("model.diffusion_model", unet_shapes(**unet)),
        **under("first_stage_model", vae_shapes(vae_channels)),
        **under(
            "conditioner.embedders.0.transformer.text_model",
            clip_shapes(widths[0], layers[0], vocab=vocab),
        ),
        **under("conditioner.embedders.1.model", second),
        "denoiser.sigmas": (1000,),
    }


def unet_shapes(channels, mult, depth, context, added=None) -> Shapes:
    """UNetModel.__init__, with two resnets for each resolution."""
    time = 4 * channels
    shapes = {**linear("time_embed.0", channels, time), **linear("time_embed.2", time, time)}
    if added is not None:
        shapes |= linear("label_emb.0.0", added, time) | linear("label_emb.0.2", time, time)
    shapes |= _conv("input_blocks.0.0", 4, channels, 3)
    width, number, skips = channels, 1, [channels]
    for level, factor in enumerate(mult):
        for _ in range(2):
            shapes |= _resblock(f"input_blocks.{number}.0", width, factor * channels, time)
            width = factor * channels
            if depth[level]:
                shapes |= _attention(f"input_blocks.{number}.1", width, depth[level], context)
            skips.append(width)
            number += 1
        if level < len(mult) - 1:
            shapes |= _conv(f"input_blocks.{number}.0.op", width, width, 3)
            skips.append(width)
            number += 1
    shapes |= _resblock("middle_block.0", width, width, time)
    shapes |= _attention("middle_block.1", width, max(depth[-2:]), context)
    shapes |= _resblock("middle_block.2", width, width, time)
    number = 0
    for level, factor in reversed(list(enumerate(mult))):
        for index in range(3):
            shapes |= _resblock(
                f"output_blocks.{number}.0", width + skips.pop(), factor * channels, time
            )
            width, part = factor * channels, 1
            if depth[level]:
                shapes |= _attention(f"output_blocks.{number}.1", width, depth[level], context)
                part = 2
            if level and index == 2:
                shapes |= _conv(f"output_blocks.{number}.{part}.conv", width, width, 3)
            number += 1
    return shapes | _norm("out.0", width) | _conv("out.2", channels, 4, 3)


def vae_shapes(channels=128, mult=(1, 2, 4, 4), latent=4) -> Shapes:
    """Encoder and Decoder of the autoencoder, with two (encoder) and three (decoder) resnets."""
    shapes = _conv("encoder.conv_in", 3, channels, 3)
    width = channels
    for level, factor in enumerate(mult):
        for index in range(2):
            shapes |= _vae_resblock(f"encoder.down.{level}.block.{index}", width, factor * channels)
            width = factor * channels
        if level < len(mult) - 1:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    shapes |= _vae_middle("encoder.mid", width)
    shapes |= _norm("encoder.norm_out", width) | _conv("encoder.conv_out", width, 2 * latent, 3)
    shapes |= _conv("decoder.conv_in", latent, width, 3) | _vae_middle("decoder.mid", width)
    for level, factor in reversed(list(enumerate(mult))):
        for index in range(3):
            shapes |= _vae_resblock(f"decoder.up.{level}.block.{index}", width, factor * channels)
            width = factor * channels
        if level:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    shapes |= _norm("decoder.norm_out", width) | _conv("decoder.conv_out", width, 3, 3)
    shapes |= _conv("quant_conv", 2 * latent, 2 * latent, 1)
    return shapes | _conv("post_quant_conv", latent, latent, 1)


def open_clip_shapes(width, layers, projection, vocab=49408) -> Shapes:
    """The text half of open_clip.CLIP."""
    shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, projection),
        "logit_scale": (),
        "token_embedding.weight": (vocab, width),
        **_norm("ln_final", width),
    }
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes |= linear(f"{block}.attn.out_proj", width, width)
        shapes |= linear(f"{block}.mlp.c_fc", width, 4 * width)
        shapes |= linear(f"{block}.mlp.c_proj", 4 * width, width)
    return shapes


def clip_shapes(width, layers, vocab=49408) -> Shapes:
    """transformers' CLIPTextTransformer, with the position_ids of its older versions."""
    shapes = {
        "embeddings.token_embedding.weight": (vocab, width),
        "embeddings.position_embedding.weight": (77, width),
        "embeddings.position_ids": (1, 77),
        **_norm("final_layer_norm", width),
    }
    for layer in range(layers):
        block = f"encoder.layers.{layer}"
        shapes |= _norm(f"{block}.layer_norm1", width) | _norm(f"{block}.layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{name}", width, width)
        shapes |= linear(f"{block}.mlp.fc1", width, 4 * width)
        shapes |= linear(f"{block}.mlp.fc2", 4 * width, width)
    return shapes


def write_header_only(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None) -> None:
    """Write a file whose tensors are a hole: full size for the header's reader, no disk space."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_random(path: Path, shapes: Shapes, metadata=None, seed=0) -> dict[str, torch.Tensor]:
    """Write random float32 tensors and return them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, path, metadata=metadata)
    return tensors


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def linear(name: str, inner: int, outer: int, *, has_bias: bool = True) -> Shapes:
    bias = {f"{name}.bias": (outer,)} if has_bias else {}
    return {f"{name}.weight": (outer, inner), **bias}


def _conv(name: str, inner: int, outer: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outer, inner, kernel, kernel), f"{name}.bias": (outer,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resblock(name: str, inner: int, outer: int, time: int) -> Shapes:
    skip = _conv(f"{name}.skip_connection", inner, outer, 1) if inner != outer else {}
    return {
        **_norm(f"{name}.in_layers.0", inner),
        **_conv(f"{name}.in_layers.2", inner, outer, 3),
        **linear(f"{name}.emb_layers.1", time, outer),
        **_norm(f"{name}.out_layers.0", outer),
        **_conv(f"{name}.out_layers.3", outer, outer, 3),
        **skip,
    }


def _attention(name: str, width: int, depth: int, context: int) -> Shapes:
    shapes = _norm(f"{name}.norm", width)
    shapes |= linear(f"{name}.proj_in", width, width)
    shapes |= linear(f"{name}.proj_out", width, width)
    for layer in range(depth):
        block = f"{name}.transformer_blocks.{layer}"
        for attention, inner in (("attn1", width), ("attn2", context)):
            shapes |= linear(f"{block}.{attention}.to_q", width, width, has_bias=False)
            shapes |= linear(f"{block}.{attention}.to_k", inner, width, has_bias=False)
            shapes |= linear(f"{block}.{attention}.to_v", inner, width, has_bias=False)
            shapes |= linear(f"{block}.{attention}.to_out.0", width, width)
        shapes |= linear(f"{block}.ff.net.0.proj", width, 8 * width)
        shapes |= linear(f"{block}.ff.net.2", 4 * width, width)
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= _norm(f"{block}.{norm}", width)
    return shapes


def _vae_resblock(name: str, inner: int, outer: int) -> Shapes:
    shortcut = _conv(f"{name}.nin_shortcut", inner, outer, 1) if inner != outer else {}
    return {
        **_norm(f"{name}.norm1", inner),
        **_conv(f"{name}.conv1", inner, outer, 3),
        **_norm(f"{name}.norm2", outer),
        **_conv(f"{name}.conv2", outer, outer, 3),
        **shortcut,
    }


def _vae_middle(name: str, width: int) -> Shapes:
    shapes = _vae_resblock(f"{name}.block_1", width, width)
    shapes |= _vae_resblock(f"{name}.block_2", width, width) | _norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{part}", width, width, 1)
    return shapes
