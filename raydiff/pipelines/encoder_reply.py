"""What an encoder service and its clients say to one another, beside HTTP.

GET /health     -> {"model": ..., "revision": ..., "dtype": ...}
POST /encode    {"texts": [...]} -> safetensors: `<place>.embeds` (S, C) for each text, and in
                the metadata `revision` and `is_truncated`, a JSON list
any error       -> {"error": ...}
"""

import json
from dataclasses import dataclass
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from raydiff.pipelines.prompt_cache import EncodedPrompt

MAX_TEXTS = 16
"""Of one request: those that the encode stage encodes together."""
MAX_BODY_BYTES = 8 * 2**20
"""Of a request; the longest text that a manifest may have takes 6 MB."""
MAX_OTHER_BYTES = 64 * 2**10
"""Of every reply that holds no features, and of what a reply holds beside them for each text."""
FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceInfo:
    """What a service encodes with."""

    model: str
    revision: str
    dtype: str

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a reply of /health. Raises ValueError for anything else."""
        values = _json_object(data)
        names = ("model", "revision", "dtype")
        if not all(isinstance(values.get(name), str) for name in names):
            raise ValueError(f"expected {', '.join(names)}")
        return cls(**{name: values[name] for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeReply:
    """The features of the texts of one request, in their order."""

    revision: str
    texts: tuple[EncodedPrompt, ...]

    def serialize(self) -> bytes:
        """Return the body that `parse` reads."""
        tensors = {f"{place}.embeds": one.embeds for place, one in enumerate(self.texts)}
        metadata = {
            "revision": self.revision,
            "is_truncated": json.dumps([one.is_truncated for one in self.texts]),
        }
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)

    @classmethod
    def parse(cls, data: bytes, num_texts: int) -> Self:
        """Read a reply of /encode to so many texts. Raises ValueError for anything else."""
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        metadata = safetensors_metadata(data)
        is_truncated = _flags(metadata.get("is_truncated", ""), num_texts)
        if set(tensors) != {f"{place}.embeds" for place in range(num_texts)}:
            raise ValueError(f"expected the features of {num_texts} texts")
        texts = (
            EncodedPrompt(embeds=tensors[f"{place}.embeds"], pooled=None, is_truncated=is_cut)
            for place, is_cut in enumerate(is_truncated)
        )
        return cls(revision=metadata.get("revision", ""), texts=tuple(texts))


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """Return the header's free text: `load` has checked the header, but does not return it."""
    end = 8 + int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8:end]).get("__metadata__") or {}
    return metadata


def parse_error(data: bytes) -> str:
    """Return the message of a reply that is an error, an empty one where it is no service's."""
    try:
        message = _json_object(data).get("error")
    except ValueError:
        return ""
    text = message if isinstance(message, str) else ""
    return "".join(letter for letter in text[:500] if letter.isprintable())


def _flags(text: str, number: int) -> list[bool]:
    values = json.loads(text) if len(text) <= 7 * MAX_TEXTS else None
    is_list = isinstance(values, list) and len(values) == number
    if not is_list or not all(isinstance(value, bool) for value in values or ()):
        raise ValueError(f"is_truncated is not a list of {number} flags")
    return list(values or ())


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    return values
