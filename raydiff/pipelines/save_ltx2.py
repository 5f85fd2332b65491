"""Write an LTX-2 pipeline as a folder in Hugging Face layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from raydiff.pipelines.save import save_component, write_index
from raydiff.weights.published_ltx2 import SCHEDULER

LANGUAGE_MODEL = "language_model.model."
"""Before the names of Gemma's weights, whose image half LTX-2 has no use for."""


def save_ltx2(
    folder: Path,
    configs: Mapping[str, dict[str, Any]],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write everything but the tokenizer; `configs` and `tensors` by component."""
    for name, weights in tensors.items():
        prefix = LANGUAGE_MODEL if name == "text_encoder" else ""
        named = {f"{prefix}{key}": tensor for key, tensor in weights.items()}
        save_component(folder / name, configs[name], named)
    index = {
        "_class_name": "LTX2Pipeline",
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "Gemma3ForConditionalGeneration"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "connectors": ["ltx2", configs["connectors"]["_class_name"]],
        "vocoder": ["ltx2", configs["vocoder"]["_class_name"]],
    }
    index |= {
        name: ["diffusers", configs[name]["_class_name"]]
        for name in ("transformer", "vae", "audio_vae")
    }
    write_index(folder, index, SCHEDULER)


def gemma_config(text_config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return the config.json of a text encoder with such a language model."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {**text_config, "model_type": "gemma3_text", "vocab_size": vocab_size},
    }
