"""LTX-2's texts: prompts to features (a few kilobytes per token, for the cache and the way between
workers), and features to the embeddings that the transformer attends to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raydiff.gemma_tokenizer import GemmaTokenizer
from raydiff.memory.residency import Residency
from raydiff.models.gemma3 import Gemma3TextEncoder
from raydiff.models.ltx2.connectors import LTX2Connectors, TextEmbeds
from raydiff.pipelines.ltx2.components import LTX2Components
from raydiff.pipelines.prompt_cache import EncodedPrompt


class GemmaTexts:
    """Encodes with the checkpoint's own Gemma."""

    def __init__(self, parts: LTX2Components, residency: Residency) -> None:
        self._parts = parts
        self._residency = residency

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Return each text's features (S, C), what it would get alone.

        Raises ConfigError where the pipeline was loaded without the stage `encode`.
        """
        tokenizer = self._parts.needed(self._parts.tokenizer, "encode")
        encoder = self._parts.needed(self._parts.text_encoder, "encode")
        connectors = self._parts.needed(self._parts.connectors, "encode")
        device = self._residency.device_of("text_encoder")
        with self._residency.on_device("text_encoder", "connectors"):
            return [encode_text(text, tokenizer, encoder, connectors, device) for text in texts]


def encode_text(
    text: str,
    tokenizer: GemmaTokenizer,
    encoder: Gemma3TextEncoder,
    connectors: LTX2Connectors,
    device: torch.device,
) -> EncodedPrompt:
    """Return a text's features (S, C), S its tokens: both streams' side by side.

    It is run alone and without its padding, so that no other text has a say in its last bits.
    """
    tokens = tokenizer.encode([text])
    start = tokenizer.max_length - max(1, tokens.lengths[0])
    input_ids = torch.from_numpy(tokens.input_ids[:, start:]).to(device)
    mask = torch.from_numpy(tokens.attention_mask[:, start:]).to(device)
    states = encoder(input_ids, mask, first_position=start)  # (1, L + 1, S, C)
    features = connectors.project(states, mask)
    is_shared = not connectors.config.has_projection_for_each
    embeds = features.video if is_shared else torch.cat(features, dim=-1)
    return EncodedPrompt(embeds=embeds[0], pooled=None, is_truncated=tokens.is_truncated[0])


def connect_texts(
    texts: Sequence[EncodedPrompt],
    connectors: LTX2Connectors,
    num_embeds: int,
    device: torch.device,
) -> TextEmbeds:
    """Return the embeddings (T, num_embeds, C) of each stream; each text is run alone."""
    dtype = connectors.video_connector.learnable_registers.dtype
    rows = [_connect(text.embeds.to(device, dtype), connectors, num_embeds) for text in texts]
    return TextEmbeds(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def _connect(features: Tensor, connectors: LTX2Connectors, num_embeds: int) -> TextEmbeds:
    features = features[None]  # (1, S, C)
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if connectors.config.has_projection_for_each:
        video_dim = connectors.config.video.dim
        video, audio = features[..., :video_dim], features[..., video_dim:]
        return connectors.connect(TextEmbeds(video, audio), mask, num_embeds)
    return connectors.connect(TextEmbeds(features, features), mask, num_embeds)
