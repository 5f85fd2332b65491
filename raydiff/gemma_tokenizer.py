"""Gemma's BPE: prompts to token ids padded on the left, equal to transformers' GemmaTokenizer.

Like it (5.23), this takes the vocabulary, merges and special tokens from a checkpoint's files; that
spaces become "▁" and unknown characters bytes is Gemma's, whatever a tokenizer.json says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from raydiff.errors import ModelError
from raydiff.tokenizer_files import (
    AddedTokens,
    NamedTokens,
    SpecialToken,
    TokenizerJson,
    parse_merges,
    read_json,
    read_optional,
    write_json,
)
from raydiff.word_merges import merges_of

MAX_LENGTH = 1024
"""Tokens that LTX-2 was trained with, bos and padding included."""

SPACE = "▁"
NAMED_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
"""Gemma's own, in the order of their ids, which begin at 0."""

TINY_WORDS = ("the", "of", "and", "with", "on", "video", "camera", "cat", "dog", "red", "blue")


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmaTokens:
    """Prompts as the text encoder takes them."""

    input_ids: NDArray[np.int64]
    """(B, max_length): padding, bos, the prompt."""
    attention_mask: NDArray[np.bool_]
    """(B, max_length): true at all but the padding."""
    is_truncated: tuple[bool, ...]
    """Per prompt: it was longer, and its end was cut off."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Per prompt: tokens, bos included; they are the last ones of its row."""
        return tuple(self.attention_mask.sum(axis=1).tolist())


class GemmaTokenizer:
    """Token ids for a Gemma text encoder."""

    def __init__(
        self,
        backend: Tokenizer,
        *,
        pad_token_id: int,
        prefix: Sequence[int],
        suffix: Sequence[int],
        max_length: int = MAX_LENGTH,
    ) -> None:
        self._backend = backend
        self._prefix, self._suffix = list(prefix), list(suffix)
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.vocab_size = 1 + max(backend.get_vocab().values())
        """Added tokens included: the encoder must have as many embeddings."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read tokenizer.json, and tokenizer_config.json beside it.

        Raises ModelError naming the file that is missing or corrupt.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        content = read_json(path, _TokenizerJson)
        config = read_optional(folder / "tokenizer_config.json", _TokenizerConfig)
        named = _named(config, content, path)
        merges = parse_merges(content.model.merges, content.model.vocab, path)
        backend = _build(content.model.vocab, merges, named, content.added_tokens)
        ids = backend.get_vocab()
        for token in content.added_tokens:
            if ids[token.content] != token.id:
                raise ModelError(
                    f"{path}: added token {token.content!r} has id {token.id}; after those before "
                    f"it, it must be {ids[token.content]}"
                )
        prefix, suffix = _around(content, ids, path)
        return cls(
            backend,
            pad_token_id=ids[named["pad_token"].content],
            prefix=prefix,
            suffix=suffix,
            max_length=config.max_length,
        )

    @staticmethod
    def max_length_of(folder: str | Path) -> int:
        """Return the length that a folder's tokenizer pads to, without reading its vocabulary."""
        return read_optional(Path(folder) / "tokenizer_config.json", _TokenizerConfig).max_length

    def encode(self, texts: Sequence[str]) -> GemmaTokens:
        """Tokenize prompts, less the white space around them; one that is too long is cut."""
        shape = (len(texts), self.max_length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.bool_)
        room = self.max_length - len(self._prefix) - len(self._suffix)
        is_truncated = []
        for row, text in enumerate(texts):
            ids = self._backend.encode(text.strip()).ids
            is_truncated.append(len(ids) > room)
            ids = [*self._prefix, *ids[:room], *self._suffix]
            if ids:
                input_ids[row, -len(ids) :] = ids
                attention_mask[row, -len(ids) :] = True
        return GemmaTokens(
            input_ids=input_ids, attention_mask=attention_mask, is_truncated=tuple(is_truncated)
        )


def write_tiny_gemma_tokenizer(
    folder: str | Path, words: Sequence[str] = TINY_WORDS, *, max_length: int = MAX_LENGTH
) -> int:
    """Write a real Gemma tokenizer with a small vocabulary, and return the vocabulary's size.

    Each of `words` is one token at the start of a prompt, and one after a space; other ASCII is
    spelled, and all else comes in bytes. Laid out as Gemma's own: special tokens, bytes, the rest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The space comes last: joined to a word's beginning, it would be lost to a longer one.
    merges = [*merges_of(words), *((SPACE, word) for word in dict.fromkeys(words))]
    tokens = list(NAMED_TOKENS.values())
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [SPACE, *map(chr, range(0x21, 0x7F)), *(left + right for left, right in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    named = {name: SpecialToken(content=token) for name, token in NAMED_TOKENS.items()}
    backend = _build(vocab, merges, named, [])
    bos = NAMED_TOKENS["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **NAMED_TOKENS,
        "model_max_length": max_length,
        "padding_side": "left",
        "tokenizer_class": "GemmaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    return len(vocab)


def _named(
    config: "_TokenizerConfig", content: "_TokenizerJson", path: Path
) -> dict[str, SpecialToken]:
    """Return the named tokens by name: the config's, or Gemma's own."""
    known = {*content.model.vocab, *(token.content for token in content.added_tokens)}
    named = {}
    for name, default in NAMED_TOKENS.items():
        named[name] = getattr(config, name) or SpecialToken(content=default)
        if named[name].content not in known:
            raise ModelError(f"{path}: {name} {named[name].content!r} is not in the vocabulary")
    return named


def _build(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    named: Mapping[str, SpecialToken],
    added: Sequence[SpecialToken],
) -> Tokenizer:
    unk_token = named["unk_token"].content
    backend = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # These are found in prompts too: a "<bos>" typed is one token.
    listed = sorted(added, key=lambda token: token.id)
    known = {token.content for token in listed}
    backend.add_tokens([token.to_added(is_special=token.special) for token in listed])
    backend.add_tokens(
        [token.to_added(is_special=True) for token in named.values() if token.content not in known]
    )
    return backend


def _around(
    content: "_TokenizerJson", ids: Mapping[str, int], path: Path
) -> tuple[list[int], list[int]]:
    """Read what the post processor puts before and after a prompt: it has the last word, whatever
    a tokenizer_config.json says of bos and eos."""
    sides: tuple[list[int], list[int]] = ([], [])
    is_after = False
    for piece in content.post_processor.single if content.post_processor else ():
        if piece.special_token is None:
            is_after = True
        elif piece.special_token.id in ids:
            sides[is_after].append(ids[piece.special_token.id])
        else:
            raise ModelError(
                f"{path}: post_processor adds {piece.special_token.id!r}, which is not in the "
                "vocabulary"
            )
    return sides


class _TokenizerConfig(NamedTokens):
    """tokenizer_config.json."""

    tokenizer_class: Literal["GemmaTokenizer", "GemmaTokenizerFast"] = "GemmaTokenizer"
    model_max_length: float = Field(MAX_LENGTH, ge=2)

    @property
    def max_length(self) -> int:
        """What prompts are padded and cut to."""
        return int(min(self.model_max_length, MAX_LENGTH))


class _PieceToken(BaseModel):
    id: str


class _Piece(BaseModel):
    special_token: _PieceToken | None = Field(None, alias="SpecialToken")


class _Template(BaseModel):
    type: Literal["TemplateProcessing"]
    single: list[_Piece]


class _TokenizerJson(TokenizerJson, AddedTokens):
    post_processor: _Template | None = None
