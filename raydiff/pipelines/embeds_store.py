"""Encoded prompts in a folder of their own or beside a run's output: a safetensors file each.

    OUT/embeds/ab/<hash of model revision, dtype and text>.safetensors
A file that is missing or damaged is no error here, only a text that is not there; nor is a disk
that fails: the store says so and is left alone from then on.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raydiff.output.run_file import EMBEDS_DIR
from raydiff.output.storage import Storage, open_storage
from raydiff.pipelines.encoder_reply import FEATURE_DTYPES, safetensors_metadata
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.request import RECIPE_VERSION

MAX_BYTES = 64 * 2**20
"""Most that is read of a file; SDXL's have 0.3 MB in bfloat16 and 0.6 MB in float32."""


class EmbedsStore:
    """The encoded prompts of one output folder, local or in an object store."""

    def __init__(self, out: str | Storage) -> None:
        self._storage = open_storage(out)
        self.error: str | None = None
        """Why nothing is read or written any more."""

    def has_any(self) -> bool:
        """Whether there is anything to read."""
        try:
            return bool(self._storage.list_names(EMBEDS_DIR))
        except OSError as error:
            self._give_up(error)
            return False

    def read(
        self, texts: Iterable[str], *, revision: str, dtype: torch.dtype, may_cast: bool = False
    ) -> dict[str, EncodedPrompt]:
        """Return those of the texts that are here, intact.

        With `may_cast` a text that is not here in `dtype` is cast from float32, bfloat16 or
        float16, the first of these that it is here in.
        """
        others = [other for other in FEATURE_DTYPES if may_cast and other != dtype]
        found: dict[str, EncodedPrompt] = {}
        for text in texts:
            for one in (dtype, *others):
                encoded = None if self.error is not None else self._read(text, revision, one)
                if encoded is not None:
                    found[text] = encoded.cast(dtype)
                    break
        return found

    def _read(self, text: str, revision: str, dtype: torch.dtype) -> EncodedPrompt | None:
        key = _key(revision, dtype, text)
        try:
            data = self._storage.read_range(_file_name(key), 0, MAX_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None
        return _parse(data, key, dtype)

    def write(self, encoded: Mapping[str, EncodedPrompt], *, revision: str) -> None:
        """Keep encoded texts; each file is there whole or not at all."""
        for text, one in encoded.items():
            if self.error is not None:
                return
            key = _key(revision, one.embeds.dtype, text)
            try:
                self._storage.put(_file_name(key), _serialize(one, key), is_durable=False)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = f"{self._storage.describe(EMBEDS_DIR)}: {error.strerror or error}"


def _key(revision: str, dtype: torch.dtype, text: str) -> str:
    """Return the hash of everything that an embedding depends on, 32 hex digits."""
    parts = [RECIPE_VERSION, revision, str(dtype), text]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _file_name(key: str) -> str:
    return f"{EMBEDS_DIR}/{key[:2]}/{key}.safetensors"


def _serialize(encoded: EncodedPrompt, key: str) -> bytes:
    tensors = {"embeds": encoded.embeds}
    if encoded.pooled is not None:
        tensors["pooled"] = encoded.pooled
    metadata = {
        "is_truncated": json.dumps(encoded.is_truncated),
        "checksum": _checksum(encoded, key),
    }
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def _parse(data: bytes, key: str, dtype: torch.dtype) -> EncodedPrompt | None:
    """Return what `_serialize` was given, None where the file is damaged or another one's."""
    try:
        tensors = load(data)
    except SafetensorError:
        return None
    metadata = safetensors_metadata(data)
    embeds, pooled = tensors.get("embeds"), tensors.get("pooled")
    if embeds is None or embeds.dtype != dtype:
        return None
    encoded = EncodedPrompt(
        embeds=embeds, pooled=pooled, is_truncated=metadata.get("is_truncated") == "true"
    )
    return encoded if metadata.get("checksum") == _checksum(encoded, key) else None


def _checksum(encoded: EncodedPrompt, key: str) -> str:
    """Return a hash of the content and of whose it is: the format itself has none."""
    digest = hashlib.blake2b(f"{key} {encoded.is_truncated}".encode(), digest_size=16)
    for tensor in (encoded.embeds, encoded.pooled):
        if tensor is not None:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
