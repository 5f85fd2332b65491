"""CLIP text encoders: OpenCLIP's names, and transformers' two spellings, to ours."""

from raydiff.weights.keymaps.rules import Block, KeyMap, Parts, To

_LAYER: Parts = {
    "ln_1": "layer_norm1",
    "attn.in_proj_weight": To(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "thirds"
    ),
    "attn.in_proj_bias": To(
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "thirds"
    ),
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

OPEN_CLIP: KeyMap = {
    "token_embedding": Block("text_model.embeddings.token_embedding"),
    "positional_embedding": Block("text_model.embeddings.position_embedding.weight"),
    "transformer.resblocks.{n}": Block("text_model.encoder.layers.{n}", _LAYER),
    "ln_final": Block("text_model.final_layer_norm"),
    # A parameter that is multiplied from the right; ours is a linear layer's weight.
    "text_projection": Block("text_projection", {"": To(("weight",), "transpose")}),
}

TRANSFORMERS_CLIP: KeyMap = {
    "text_model": Block("text_model"),
    "text_projection": Block("text_projection"),
    # transformers 5 saves a CLIPTextModel without the prefix that its files always had.
    "embeddings": Block("text_model.embeddings"),
    "encoder": Block("text_model.encoder"),
    "final_layer_norm": Block("text_model.final_layer_norm"),
    # SDXL's original single file wraps the same names once more.
    "transformer": Block(""),
}
