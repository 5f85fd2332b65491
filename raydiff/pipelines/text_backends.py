"""Where LTX-2's features of texts come from, other than the checkpoint's own Gemma: a folder that
`raydiff encode` wrote, an encoder service, or, to try a run out, noise.

texts -> encode: EncodedPrompt each, features (S, C) as `ltx2_text.encode_text` makes them
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from raydiff.config import LTX2Config, encoder_address
from raydiff.errors import ConfigError, EngineError, RowError
from raydiff.manifest.schema import quoted
from raydiff.pipelines.embeds_store import EmbedsStore
from raydiff.pipelines.encoder_client import EncoderClient
from raydiff.pipelines.encoder_reply import (
    FEATURE_DTYPES,
    MAX_OTHER_BYTES,
    MAX_TEXTS,
    EncodeReply,
)
from raydiff.pipelines.prompt_cache import EncodedPrompt

UNREAD = "its text was not read: ltx2.text_encoder is random"
"""The warning of every clip that was made with noise in the place of its texts."""


class TextBackend(Protocol):
    """What LTX2Pipeline asks for the features of texts. Not thread-safe, as the pipeline."""

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Return each text's features (S, C), what it would get alone.

        Raises RowError, which names the text, where one of them has none: the caller asks again
        for the others. EngineError says that no text will get any.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """The features that a checkpoint takes."""

    revision: str
    """The checkpoint's."""
    num_channels: int
    """C, `LTX2ConnectorsConfig.num_features`."""
    max_tokens: int
    """The most that S can be: what the tokenizer pads to."""
    dtype: torch.dtype
    """That they come in; those of another one are cast to it."""

    @property
    def max_bytes(self) -> int:
        """Most bytes of one text's features in any dtype."""
        return 4 * self.max_tokens * self.num_channels

    def problem(self, encoded: EncodedPrompt) -> str | None:
        """Say why these are no features of this checkpoint, None where they are."""
        embeds = encoded.embeds
        if embeds.dtype not in FEATURE_DTYPES or embeds.ndim != 2:
            return f"they are {tuple(embeds.shape)} {embeds.dtype}; expected (S, C) floats"
        if not 1 <= embeds.shape[0] <= self.max_tokens or embeds.shape[1] != self.num_channels:
            return (
                f"they are {tuple(embeds.shape)}; this checkpoint takes 1 to {self.max_tokens} "
                f"tokens of {self.num_channels} channels"
            )
        return None if bool(embeds.isfinite().all()) else "they have NaN or infinity in them"


def text_backend(config: LTX2Config, spec: FeatureSpec) -> TextBackend | None:
    """Return what `ltx2.text_encoder` names, None for gemma3, the checkpoint's own encoder.

    Raises ConfigError for a folder without encoded texts, a host that is not allowed and a service
    with another checkpoint; EngineError for a service that does not answer.
    """
    match config.text_encoder:
        case "precomputed":
            return PrecomputedTexts(config.embeds or "", spec)
        case "api":
            try:
                address = encoder_address(config)
            except ValueError as error:
                raise ConfigError(f"ltx2: {error}") from None
            return RemoteTexts(EncoderClient(address), spec)
        case "random":
            return RandomTexts(spec)
        case "gemma3":
            return None


class PrecomputedTexts:
    """Reads a folder in the format of `EmbedsStore`, and writes nothing."""

    def __init__(self, folder: str, spec: FeatureSpec) -> None:
        self._store = EmbedsStore(folder)
        self._folder = folder
        self._spec = spec
        if not self._store.has_any():
            raise ConfigError(
                f"ltx2.embeds: {folder}: {self._store.error or 'there are no encoded texts'}. "
                "Name a folder that `raydiff encode` wrote"
            )

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Read the texts' features. Raises RowError for a text that is not there, EngineError for
        a disk that fails."""
        spec = self._spec
        found = self._store.read(texts, revision=spec.revision, dtype=spec.dtype, may_cast=True)
        if self._store.error is not None:
            raise EngineError(f"{self._store.error}. Make it readable and run the command again")
        for text in texts:
            if text not in found:
                raise RowError(
                    f"{quoted(text)} is not among the encoded texts in {self._folder}, or its file "
                    f"is damaged, for this checkpoint ({spec.revision}). Run `raydiff encode` with "
                    "the same rows, model and ltx2.mode"
                )
            problem = spec.problem(found[text])
            if problem is not None:
                raise RowError(f"the features of {quoted(text)} in {self._folder}: {problem}")
        return [found[text] for text in texts]


class RemoteTexts:
    """Asks an encoder service that has the same checkpoint."""

    def __init__(self, client: EncoderClient, spec: FeatureSpec) -> None:
        self._client = client
        self._spec = spec
        problem = self._other_revision(client.health().revision)
        if problem is not None:
            raise ConfigError(problem)

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Ask for the texts' features, some at a time. Raises RowError for texts that the service
        refuses, EngineError for a service that stays away or whose answers are of no use."""
        return [encoded for group in _groups(texts) for encoded in self._ask(group)]

    def _ask(self, texts: Sequence[str]) -> Iterator[EncodedPrompt]:
        max_bytes = len(texts) * (self._spec.max_bytes + MAX_OTHER_BYTES)
        data = self._client.encode(texts, max_bytes)
        try:
            reply = EncodeReply.parse(data, len(texts))
        except ValueError as error:
            raise self._useless(str(error)) from None
        problem = self._other_revision(reply.revision)
        if problem is not None:
            raise EngineError(problem)
        for encoded in reply.texts:
            problem = self._spec.problem(encoded)
            if problem is not None:
                raise self._useless(f"features: {problem}")
            yield encoded.cast(self._spec.dtype)

    def _other_revision(self, revision: str) -> str | None:
        if revision == self._spec.revision:
            return None
        return (
            f"encoder service {self._client.url}: its checkpoint is of revision {revision[:80]!r}, "
            f"this run's of {self._spec.revision!r}. Start it with the same checkpoint"
        )

    def _useless(self, why: str) -> EngineError:
        return EngineError(
            f"encoder service {self._client.url}: its answer is of no use: {why}. "
            "Check that both have one version of raydiff"
        )


class RandomTexts:
    """Noise in the place of features, the same for the same text: no encoder is needed."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._spec = spec

    def encode(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Return a token for each word, and one more; none of it says what the text says."""
        return [self._noise(text).cast(self._spec.dtype) for text in texts]

    def _noise(self, text: str) -> EncodedPrompt:
        num_tokens = min(1 + len(text.split()), self._spec.max_tokens)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
        noise = torch.randn(num_tokens, self._spec.num_channels, generator=generator)
        return EncodedPrompt(embeds=noise, pooled=None, is_truncated=False)


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), MAX_TEXTS):
        yield texts[start : start + MAX_TEXTS]
