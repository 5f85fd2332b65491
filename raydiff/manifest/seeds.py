"""The seed of a row that names none."""

import hashlib
import json
from collections.abc import Iterable
from json.encoder import encode_basestring_ascii
from typing import Any

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


class SeedContent:
    """What `derive_seed` hashes, for rows that differ in their texts and index alone."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings` are the rows' own values but for prompt and negative_prompt."""
        # In the canonical form names are in order: the texts stand between these three.
        self._head = self._middle = self._tail = ""
        for name in sorted(settings.keys() - {"num_images"}):
            text = _CANONICAL_JSON.encode({name: settings[name]})[1:-1]
            if name < "negative_prompt":
                self._head += f"{text},"
            elif name < "prompt":
                self._middle += f"{text},"
            else:
                self._tail += f",{text}"

    def canonical(self, row_index: int, prompt: str, negative_prompt: str | None) -> str:
        """Return the canonical form of one of the rows."""
        negative = ""
        if negative_prompt is not None:
            negative = f'"negative_prompt":{encode_basestring_ascii(negative_prompt)},'
        return (
            f"[{row_index},{{{self._head}{negative}{self._middle}"
            f'"prompt":{encode_basestring_ascii(prompt)}{self._tail}}}]'
        )


def derive_seeds(canonical_rows: Iterable[str]) -> NDArray[np.int64]:
    """Return what `derive_seed` does for rows in their canonical form."""
    hashes = [hashlib.blake2b(row.encode(), digest_size=4).digest() for row in canonical_rows]
    return np.frombuffer(b"".join(hashes), ">u4").astype(np.int64)


_CANONICAL_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))
