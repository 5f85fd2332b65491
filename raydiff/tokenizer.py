"""CLIP's byte-level BPE: prompts to token ids, equal to transformers' CLIPTokenizer (5.23).

Like it, this takes the vocabulary, merges and special tokens from a checkpoint's files; the
normaliser and the split into words are CLIP's, whatever a tokenizer.json says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from raydiff.errors import ModelError
from raydiff.tokenizer_files import (
    AddedTokens,
    NamedTokens,
    SpecialToken,
    TokenizerJson,
    Vocabulary,
    parse_merges,
    read_json,
    read_optional,
    read_text,
    write_json,
)
from raydiff.word_merges import merges_of

MAX_LENGTH = 77
"""Positions that CLIP was trained with, bos and eos included."""

BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
WORD_END = "</w>"

WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""What BPE does not merge across, from OpenAI's CLIP."""

NAMED_TOKENS = {
    "bos_token": BOS_TOKEN,
    "eos_token": EOS_TOKEN,
    "unk_token": EOS_TOKEN,
    "pad_token": EOS_TOKEN,
}
"""With the defaults, in the order in which transformers adds them to the vocabulary."""

TINY_WORDS = ("the", "of", "and", "with", "on", "photo", "painting", "cat", "dog", "red", "blue")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Prompts as a text encoder takes them."""

    input_ids: NDArray[np.int64]
    """(B, max_length): bos, the prompt, eos, padding."""
    is_truncated: tuple[bool, ...]
    """Per prompt: it was longer, and its end was cut off."""


class CLIPTokenizer:
    """Token ids for one text encoder; the encoders of one model differ in their pad token."""

    def __init__(self, backend: Tokenizer, *, pad_token: str, max_length: int = MAX_LENGTH) -> None:
        self._backend = backend
        vocab = backend.get_vocab()
        self.pad_token_id = vocab[pad_token]
        self.max_length = max_length
        self.vocab_size = 1 + max(vocab.values())
        """Added tokens included: the encoder must have as many embeddings."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Read tokenizer.json, or vocab.json + merges.txt, and the special tokens beside it.

        Raises ModelError naming the file that is missing or corrupt.
        """
        folder = Path(folder)
        vocab, merges = _read_vocabulary(folder)
        config = read_optional(folder / "tokenizer_config.json", _TokenizerConfig)
        named, added = _read_special_tokens(folder, config)
        for name, token in named.items():
            if token.content not in vocab and token.content not in added:
                raise ModelError(
                    f"tokenizer {folder}: {name} {token.content!r} is not in the vocabulary"
                )
        return cls(
            _build(vocab, merges, named, added),
            pad_token=named["pad_token"].content,
            max_length=int(min(config.model_max_length, MAX_LENGTH)),
        )

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Tokenize prompts; one that is too long keeps its first tokens, and eos as the last."""
        input_ids = np.full((len(texts), self.max_length), self.pad_token_id, dtype=np.int64)
        is_truncated = []
        for row, text in enumerate(texts):
            ids = self._backend.encode(text).ids
            is_truncated.append(len(ids) > self.max_length)
            if is_truncated[row]:
                ids = [*ids[: self.max_length - 1], ids[-1]]
            input_ids[row, : len(ids)] = ids
        return Tokens(input_ids=input_ids, is_truncated=tuple(is_truncated))


def write_tiny_tokenizer(
    folder: str | Path,
    pad_token: str,
    words: Sequence[str] = TINY_WORDS,
    max_length: int = MAX_LENGTH,
) -> int:
    """Write a real CLIP tokenizer with a small vocabulary, and return the vocabulary's size.

    Each of `words` is one token; all else is spelled. Laid out as CLIP's own: 256 byte symbols ("!"
    is 0), the same at the end of a word, merges, and last bos and eos. `pad_token` is one of these.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges_of([*word[:-1], word[-1] + WORD_END] for word in words)
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols)]
    tokens += [*(left + right for left, right in merges), BOS_TOKEN, EOS_TOKEN]
    vocab = {token: index for index, token in enumerate(tokens)}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {name: {"content": content, **flags} for name, content in NAMED_TOKENS.items()}
    special_tokens_map = {**names, "pad_token": pad_token}
    config = {
        **special_tokens_map,
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special_tokens_map)
    write_json(folder / "tokenizer_config.json", config)
    named = _first_named(NamedTokens.model_validate(special_tokens_map))
    _build(vocab, merges, named, {}).save(str(folder / "tokenizer.json"))
    return len(vocab)


def _build(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    named: Mapping[str, AddedToken],
    added: Mapping[str, AddedToken],
) -> Tokenizer:
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            unk_token=named["unk_token"].content,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # These are found in prompts too: where "!" is the pad token, every "!" typed becomes one.
    backend.add_tokens([*added.values(), *(t for t in named.values() if t.content not in added)])
    ids = backend.get_vocab()
    bos, eos = named["bos_token"].content, named["eos_token"].content
    backend.post_processor = processors.RobertaProcessing(
        (eos, ids[eos]), (bos, ids[bos]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read ids by token, and merges in order of rank."""
    if (folder / "tokenizer.json").exists():
        merges_file = folder / "tokenizer.json"
        model = read_json(merges_file, TokenizerJson).model
        return model.vocab, parse_merges(model.merges, model.vocab, merges_file)
    if not (folder / "vocab.json").exists():
        raise ModelError(
            f"tokenizer {folder}: neither tokenizer.json nor vocab.json is there; "
            "expected the tokenizer folder of a diffusers pipeline"
        )
    merges_file = folder / "merges.txt"
    vocab = read_json(folder / "vocab.json", Vocabulary)
    lines = read_text(merges_file).split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    return vocab, parse_merges(lines, vocab, merges_file)


def _read_special_tokens(
    folder: Path, config: "_TokenizerConfig"
) -> tuple[dict[str, AddedToken], dict[str, AddedToken]]:
    """Read the named tokens by name, and all that are listed as added, by content, lowest id first.

    A tokenizer_config.json with `added_tokens_decoder` is complete, and older files beside it are
    leftovers. Without, special_tokens_map.json has the last word.
    """
    if config.added_tokens_decoder is not None:
        named, listed = _first_named(config), config.added_tokens_decoder
    else:
        special_tokens_map = read_optional(folder / "special_tokens_map.json", NamedTokens)
        named = _first_named(special_tokens_map, config)
        contents = {token.content for token in named.values()}
        extra = read_optional(folder / "added_tokens.json", Vocabulary)
        listed = {
            id_: SpecialToken(content=text, special=text in contents) for text, id_ in extra.items()
        }
        serialized = read_optional(folder / "tokenizer.json", AddedTokens)
        listed |= {token.id: token for token in serialized.added_tokens}
    added = [token for _, token in sorted(listed.items())]
    return named, {token.content: token.to_added(is_special=token.special) for token in added}


def _first_named(*sources: "NamedTokens") -> dict[str, AddedToken]:
    """Take each named token from the first source that has it."""
    tokens = {}
    for name, default in NAMED_TOKENS.items():
        given = (getattr(source, name) for source in sources)
        token: SpecialToken = next(filter(None, given), SpecialToken(content=default))
        tokens[name] = token.to_added(is_special=True)
    return tokens


class _TokenizerConfig(NamedTokens):
    """tokenizer_config.json."""

    added_tokens_decoder: dict[int, SpecialToken] | None = None
    model_max_length: float = Field(MAX_LENGTH, ge=3)
