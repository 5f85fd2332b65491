"""How a table of renames is read: a block says where the beginning of a tensor's name goes, and its
parts say what the rest is called and how the tensor is reshaped on the way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reshape = Literal["keep", "linear", "transpose", "thirds"]
"""linear: drop the trailing 1s of a 1x1 convolution's weight. thirds: cut the rows of a fused
query, key and value projection in three, one for each name."""


@dataclass(frozen=True, slots=True)
class To:
    """Our name for a tensor (three names for `thirds`), and the reshape that belongs to it."""

    names: tuple[str, ...]
    reshape: Reshape = "keep"


Parts = Mapping[str, str | To]
"""{beginning of the rest of their name: ours}."""


@dataclass(frozen=True, slots=True)
class Block:
    """Our name of a block; with parts, the rest of a name must begin with one of them."""

    name: str
    parts: Parts = field(default_factory=dict)


KeyMap = Mapping[str, Block]
"""{beginning of their name: Block}. `{n}` as the last word stands for any number, which then takes
the place of `{n}` in our name."""


def rename(keymap: KeyMap, name: str) -> To | None:
    """Return our name for a tensor of another layout, or None when no line of the table has it."""
    for head, rest in _splits(name):
        stem, _, number = head.rpartition(".")
        block = keymap.get(head)
        if block is None and number.isdigit():
            block = keymap.get(stem + ".{n}")
        if block is None:
            continue
        part = _part(block, rest)
        if part is None:
            return None
        prefix = block.name.replace("{n}", number)
        return To(tuple(_join(prefix, name) for name in part.names), part.reshape)
    return None


def _part(block: Block, rest: str) -> To | None:
    if not block.parts:
        return To((rest,))
    for head, tail in _splits(rest):
        part = block.parts.get(head)
        if isinstance(part, str):
            return To((_join(part, tail),))
        if part is not None:
            return To(tuple(_join(name, tail) for name in part.names), part.reshape)
    return None


def _splits(name: str) -> list[tuple[str, str]]:
    """Return `a.b.c` as (a.b.c, ), (a.b, c), (a, b.c): the longest beginning first."""
    words = name.split(".")
    ends = range(len(words), 0, -1)
    return [(".".join(words[:end]), ".".join(words[end:])) for end in ends]


def _join(head: str, tail: str) -> str:
    return f"{head}.{tail}" if head and tail else head or tail
