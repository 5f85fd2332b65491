"""A bounded cache of encoded prompts: sweeps and negative prompts repeat the same few texts."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_PROMPTS = 128
"""About 40 MB of SDXL embeddings in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """One text's embeddings (S, C) and pooled embedding (P,), and whether the text was cut."""

    embeds: Tensor
    pooled: Tensor | None
    is_truncated: bool

    @property
    def nbytes(self) -> int:
        """Bytes of both embeddings."""
        return self.embeds.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def on_host(self) -> "EncodedPrompt":
        """Return a copy in host memory, in tensors of its own."""
        return EncodedPrompt(
            embeds=self.embeds.to("cpu", copy=True),
            pooled=None if self.pooled is None else self.pooled.to("cpu", copy=True),
            is_truncated=self.is_truncated,
        )

    def cast(self, dtype: torch.dtype) -> "EncodedPrompt":
        """Return it in another dtype; itself where that is its own."""
        if self.embeds.dtype == dtype:
            return self
        return EncodedPrompt(
            embeds=self.embeds.to(dtype),
            pooled=None if self.pooled is None else self.pooled.to(dtype),
            is_truncated=self.is_truncated,
        )

    def zeros_like(self) -> "EncodedPrompt":
        """Return the zero embedding of the same shape."""
        return EncodedPrompt(
            embeds=self.embeds.new_zeros(self.embeds.shape),
            pooled=None if self.pooled is None else self.pooled.new_zeros(self.pooled.shape),
            is_truncated=False,
        )


class PromptCache:
    """Keeps the most recently used encodings of one model."""

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._encoded: OrderedDict[str, EncodedPrompt] = OrderedDict()

    def get_or_encode(
        self, texts: Sequence[str], encode: Callable[[Sequence[str]], list[EncodedPrompt]]
    ) -> dict[str, EncodedPrompt]:
        """Return each text's encoding; the ones not held are encoded together, each once."""
        wanted = dict.fromkeys(texts)
        missing = [text for text in wanted if text not in self._encoded]
        fresh = dict(zip(missing, encode(missing), strict=True)) if missing else {}
        found = {text: fresh[text] if text in fresh else self._encoded[text] for text in wanted}
        for text, encoded in found.items():
            self._encoded[text] = encoded
            self._encoded.move_to_end(text)
        while len(self._encoded) > self._max_prompts:
            self._encoded.popitem(last=False)
        return found
