"""The seed of a row that names none."""

import hashlib
import json
from typing import Any


def derive_seed(values: dict[str, Any], row_index: int) -> int:
    """Return a 32-bit seed from the row's own values and its index, and from nothing else.

    The run's defaults are left out, so two runs of a manifest that differ in model or sampler
    start from the same noise; so is num_images, so that asking for more keeps the first ones.
    """
    content = {name: value for name, value in values.items() if name != "num_images"}
    canonical = _CANONICAL_JSON.encode([row_index, content])
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=4).digest(), "big")


_CANONICAL_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))
