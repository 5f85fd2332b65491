"""The files of a tokenizer folder: their schemas, and errors that name the file and the place."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from tokenizers import AddedToken

from raydiff.errors import ModelError

T = TypeVar("T")


class SpecialToken(BaseModel):
    """One special token: its text and how it is looked for in a prompt."""

    content: str = Field(min_length=1)
    id: int = -1
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None

    def to_added(self, *, is_special: bool) -> AddedToken:
        """Return it as the `tokenizers` library takes it."""
        return AddedToken(
            self.content,
            special=is_special,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            single_word=self.single_word,
            normalized=not is_special if self.normalized is None else self.normalized,
        )


def _from_text(value: Any) -> Any:
    return {"content": value} if isinstance(value, str) else value


_TokenOrText = Annotated[SpecialToken, BeforeValidator(_from_text)]
Vocabulary = dict[str, Annotated[int, Field(ge=0, lt=2**32)]]
"""Ids by token."""


class NamedTokens(BaseModel):
    """special_tokens_map.json."""

    bos_token: _TokenOrText | None = None
    eos_token: _TokenOrText | None = None
    unk_token: _TokenOrText | None = None
    pad_token: _TokenOrText | None = None
    mask_token: _TokenOrText | None = None


class AddedTokens(BaseModel):
    """The special tokens of tokenizer.json."""

    added_tokens: list[SpecialToken] = []


class BPEModel(BaseModel):
    """Tokens, and which two join to a third, in order of rank."""

    vocab: Vocabulary
    merges: list[str | tuple[str, str]]


class TokenizerJson(BaseModel):
    """The vocabulary of tokenizer.json."""

    model: BPEModel


def parse_merges(
    lines: Sequence[str | tuple[str, str]], vocab: Mapping[str, int], path: Path
) -> list[tuple[str, str]]:
    """Return merges as pairs; each must join two tokens of the vocabulary to a third."""
    merges = []
    for rank, line in enumerate(lines, start=1):
        parts = line.split(" ") if isinstance(line, str) else line
        if len(parts) != 2 or not vocab.keys() >= {*parts, "".join(parts)}:
            raise ModelError(
                f"{path}: merge {rank} is {line!r}; expected two tokens of the vocabulary that "
                "join to a third"
            )
        merges.append((parts[0], parts[1]))
    return merges


def read_optional(path: Path, schema: type[T]) -> T:
    """Read a file as `read_json` does; one that is not there is empty."""
    return read_json(path, schema) if path.exists() else schema()


def read_json(path: Path, schema: type[T]) -> T:
    """Read a JSON file. Raises ModelError that names the file, and what is wrong where."""
    try:
        return TypeAdapter(schema).validate_json(read_text(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ModelError(f"{path}: {where}: {problem['msg']}".replace(": : ", ": ")) from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises ModelError that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a file as tokenizer folders have them: indented, in plain UTF-8."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
