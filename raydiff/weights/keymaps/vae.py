"""VAE: the original names (LDM's first_stage_model) and diffusers' older ones to ours."""

from raydiff.weights.keymaps.rules import Block, KeyMap, Parts, To

_RESNET: Parts = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}

# The original computes attention with 1x1 convolutions; ours are linear layers.
_ATTENTION: Parts = {
    "norm": "group_norm",
    "q": To(("to_q",), "linear"),
    "k": To(("to_k",), "linear"),
    "v": To(("to_v",), "linear"),
    "proj_out": To(("to_out.0",), "linear"),
}

VAE: KeyMap = {
    "quant_conv": Block("quant_conv"),
    "post_quant_conv": Block("post_quant_conv"),
    "encoder.conv_in": Block("encoder.conv_in"),
    "encoder.down.0.block.{n}": Block("encoder.down_blocks.0.resnets.{n}", _RESNET),
    "encoder.down.0.downsample.conv": Block("encoder.down_blocks.0.downsamplers.0.conv"),
    "encoder.down.1.block.{n}": Block("encoder.down_blocks.1.resnets.{n}", _RESNET),
    "encoder.down.1.downsample.conv": Block("encoder.down_blocks.1.downsamplers.0.conv"),
    "encoder.down.2.block.{n}": Block("encoder.down_blocks.2.resnets.{n}", _RESNET),
    "encoder.down.2.downsample.conv": Block("encoder.down_blocks.2.downsamplers.0.conv"),
    "encoder.down.3.block.{n}": Block("encoder.down_blocks.3.resnets.{n}", _RESNET),
    "encoder.mid.block_1": Block("encoder.mid_block.resnets.0", _RESNET),
    "encoder.mid.attn_1": Block("encoder.mid_block.attentions.0", _ATTENTION),
    "encoder.mid.block_2": Block("encoder.mid_block.resnets.1", _RESNET),
    "encoder.norm_out": Block("encoder.conv_norm_out"),
    "encoder.conv_out": Block("encoder.conv_out"),
    "decoder.conv_in": Block("decoder.conv_in"),
    "decoder.mid.block_1": Block("decoder.mid_block.resnets.0", _RESNET),
    "decoder.mid.attn_1": Block("decoder.mid_block.attentions.0", _ATTENTION),
    "decoder.mid.block_2": Block("decoder.mid_block.resnets.1", _RESNET),
    # The original numbers the decoder's levels by resolution, so the one that runs first is 3.
    "decoder.up.3.block.{n}": Block("decoder.up_blocks.0.resnets.{n}", _RESNET),
    "decoder.up.3.upsample.conv": Block("decoder.up_blocks.0.upsamplers.0.conv"),
    "decoder.up.2.block.{n}": Block("decoder.up_blocks.1.resnets.{n}", _RESNET),
    "decoder.up.2.upsample.conv": Block("decoder.up_blocks.1.upsamplers.0.conv"),
    "decoder.up.1.block.{n}": Block("decoder.up_blocks.2.resnets.{n}", _RESNET),
    "decoder.up.1.upsample.conv": Block("decoder.up_blocks.2.upsamplers.0.conv"),
    "decoder.up.0.block.{n}": Block("decoder.up_blocks.3.resnets.{n}", _RESNET),
    "decoder.norm_out": Block("decoder.conv_norm_out"),
    "decoder.conv_out": Block("decoder.conv_out"),
}

# diffusers before 0.18 called the parts of the middle attention so; published files still do.
_OLD_ATTENTION: Parts = {
    "group_norm": "group_norm",
    "query": To(("to_q",), "linear"),
    "key": To(("to_k",), "linear"),
    "value": To(("to_v",), "linear"),
    "proj_attn": To(("to_out.0",), "linear"),
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out.0": "to_out.0",
}

DIFFUSERS_VAE: KeyMap = {
    "encoder": Block("encoder"),
    "encoder.mid_block.attentions.0": Block("encoder.mid_block.attentions.0", _OLD_ATTENTION),
    "decoder": Block("decoder"),
    "decoder.mid_block.attentions.0": Block("decoder.mid_block.attentions.0", _OLD_ATTENTION),
    "quant_conv": Block("quant_conv"),
    "post_quant_conv": Block("post_quant_conv"),
}
