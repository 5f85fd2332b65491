"""The seed of a row that names none."""

import hashlib
import json
from json.encoder import encode_basestring_ascii
from typing import Any


def derive_seed(values: dict[str, Any], row_index: int) -> int:
    """Return a 32-bit seed from the row's own values and its index, and from nothing else.

    The run's defaults are left out, so two runs of a manifest that differ in model or sampler
    start from the same noise; so is num_images, so that asking for more keeps the first ones.
    """
    content = {name: value for name, value in values.items() if name != "num_images"}
    canonical = _CANONICAL_JSON.encode([row_index, content])
    return _hashed(canonical)


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

    def seed(self, row_index: int, prompt: str, negative_prompt: str | None) -> int:
        """Return the seed of one of the rows, as `derive_seed` does."""
        negative = ""
        if negative_prompt is not None:
            negative = f'"negative_prompt":{encode_basestring_ascii(negative_prompt)},'
        return _hashed(
            f"[{row_index},{{{self._head}{negative}{self._middle}"
            f'"prompt":{encode_basestring_ascii(prompt)}{self._tail}}}]'
        )


def _hashed(canonical: str) -> int:
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=4).digest(), "big")


_CANONICAL_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))
