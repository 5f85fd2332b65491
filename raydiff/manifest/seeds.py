"""The seed of a row that names none."""

import hashlib
import json
from collections.abc import Iterable
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


def derive_seed(values: dict[str, Any], row_index: int) -> int:
    """Return a 32-bit seed from the row's own values and its index, and from nothing else.

    The run's defaults are left out, so two runs of a manifest that differ in model or sampler
    start from the same noise; so is num_images, so that asking for more keeps the first ones.
    """
    content = {name: value for name, value in values.items() if name != "num_images"}
    canonical = _CANONICAL_JSON.encode([row_index, content])
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=4).digest(), "big")


class SeedContent(NamedTuple):
    """The canonical form of rows that differ in their texts and index alone, around the texts."""

    head: str
    middle: str
    tail: str


def seed_content(settings: dict[str, Any]) -> SeedContent:
    """Return the form of rows with these values of their own, prompt and negative_prompt apart."""
    head = middle = tail = ""
    for name in sorted(settings.keys() - {"num_images"}):
        text = _CANONICAL_JSON.encode({name: settings[name]})[1:-1]
        if name < "negative_prompt":
            head += f"{text},"
        elif name < "prompt":
            middle += f"{text},"
        else:
            tail += f",{text}"
    return SeedContent(head, middle, tail)


def derive_seeds(
    rows: Iterable[tuple[SeedContent, int, str, str | None]],
) -> NDArray[np.int64]:
    """Return what `derive_seed` does, for (content, row index, prompt, negative prompt) of rows.

    One tight loop: ten million rows without seeds spend most of their plan here.
    """
    escape = encode_basestring_ascii
    new_hash = hashlib.blake2b(digest_size=4).copy  # half the time of a call with arguments
    digests = []
    for (head, middle, tail), row_index, prompt, negative in rows:
        if negative is not None:
            head += f'"negative_prompt":{escape(negative)},'
        state = new_hash()
        state.update(f'[{row_index},{{{head}{middle}"prompt":{escape(prompt)}{tail}}}]'.encode())
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), ">u4").astype(np.int64)


_CANONICAL_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))
