"""Where LTX-2's features of texts come from, other than the checkpoint's own Gemma: a folder that
`raydiff encode` wrote, an encoder service, or, to try a run out, noise.

texts -> encode: EncodedPrompt each, features (S, C) as `ltx2_text.encode_text` makes them
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch

from raydiff.pipelines.prompt_cache import EncodedPrompt


class TextBackend(Protocol):
    """What LTX2Pipeline asks for the features of texts. Not thread-safe, as the pipeline."""

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Return each text's features (S, C), what it would get alone.

        Raises RowError, which names the text, where one of them has none: the caller asks again
        for the others. EngineError says that no text will get any.
        """


class RandomTexts:
    """Noise in the place of features, the same for the same text: no encoder is needed."""

    def __init__(self, *, num_channels: int, max_tokens: int, dtype: torch.dtype) -> None:
        self._num_channels = num_channels
        self._max_tokens = max_tokens
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Return a token for each word, and one more; none of it says what the text says."""
        return [self._noise(text) for text in texts]

    def _noise(self, text: str) -> EncodedPrompt:
        num_tokens = min(1 + len(text.split()), self._max_tokens)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
        noise = torch.randn(num_tokens, self._num_channels, generator=generator)
        return EncodedPrompt(embeds=noise.to(self._dtype), pooled=None, is_truncated=False)
