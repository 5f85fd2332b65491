"""A renderer for the engine's tests: what a row's prompt says is what happens to it."""

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from raydiff.engine.messages import Role, TextKey, texts_of
from raydiff.engine.renderer import DenoisedBatch, EncodedTexts, Payload
from raydiff.errors import EngineError, OutOfMemoryError, RowError
from raydiff.output.rendered import Rendered
from raydiff.request import RenderRequest
from tests.clips import clip_audio

PROFILES = ("full_gpu", "balanced", "gpu_poor")


class FaultyRenderer:
    """Renders noise, and a tone to the frames of a clip, unless its prompt has the word `silent`.

    A prompt with one of these words fails in that way, where it is denoised: `raise`, `die`
    (SIGKILL), `crash` (in native code), `lose the GPU`, `hang` (for ever), `slow` (`slow_s`
    longer), `NaN` (no latents, without an exception), `heavy` (fits no profile but the poorest).
    `unreadable` raises where it is encoded, `black` fails where it is decoded.

    log: file that gets a line for each row that is denoised (request_id, process, batch size, the
    GPUs that CUDA would show) and, in an encode worker, one for each text (`encoded`, the text).
    max_rows: more rows in a batch are out of memory. row_ms: milliseconds that a row takes.
    """

    def __init__(
        self,
        *,
        log: str,
        row_ms: float = 1,
        max_rows: int = 8,
        slow_s: float = 2,
        role: Role = "fused",
    ) -> None:
        self._log = Path(log)
        self._row_ms = row_ms
        self._max_rows = max_rows
        self._slow_s = slow_s
        self._profile = 0

    def start(self) -> str:
        return "cpu"

    def max_batch_size(self, request: RenderRequest) -> int:
        return 8

    def render(self, requests: Sequence[RenderRequest]) -> Rendered:
        errors, denoise_s = self._denoise(requests)
        return replace(self._decoded(requests, errors, denoise_s), warnings=_warnings(requests))

    def encode(self, texts: Sequence[TextKey]) -> EncodedTexts:
        for key in texts:
            if "unreadable" in key.text:
                raise RowError(f"{key.text!r} cannot be encoded")
        self._write_lines(f"encoded {key.text}" for key in texts)
        return EncodedTexts([_embeds(key) for key in texts], 0)

    def render_encoded(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, Payload]
    ) -> Rendered:
        _check_embeds(requests, embeds)
        return self.render(requests)

    def denoise(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, Payload]
    ) -> DenoisedBatch:
        _check_embeds(requests, embeds)
        errors, denoise_s = self._denoise(requests)
        return DenoisedBatch(
            latents=[np.full((4, 8, 8), request.seed, np.float32) for request in requests],
            warnings=_warnings(requests),
            errors=errors,
            encode_s=0.0,
            denoise_s=denoise_s,
            peak_vram_bytes=None,
            profile=PROFILES[self._profile],
            dtype="float32",
        )

    def decode(self, requests: Sequence[RenderRequest], latents: Sequence[Payload]) -> Rendered:
        for request, one in zip(requests, latents, strict=True):
            if not isinstance(one, np.ndarray) or one[0, 0, 0] != request.seed:
                raise ValueError(f"{request.request_id}: the latents are another row's")
        return self._decoded(requests, [None] * len(requests), 0.0)

    def step_down(self) -> str | None:
        if self._profile + 1 == len(PROFILES):
            self._profile = 0
            return None
        self._profile += 1
        return f"profile {PROFILES[self._profile]}"

    def _denoise(self, requests: Sequence[RenderRequest]) -> tuple[list[str | None], float]:
        for request in requests:
            self._fail(request.prompt)
        is_heavy = any("heavy" in request.prompt for request in requests)
        if len(requests) > self._max_rows or (is_heavy and self._profile + 1 < len(PROFILES)):
            raise OutOfMemoryError(f"{len(requests)} rows do not fit")
        elapsed_s = self._row_ms / 1000 * len(requests)
        elapsed_s += self._slow_s * sum("slow" in request.prompt for request in requests)
        time.sleep(elapsed_s)
        about = f"{os.getpid()} {len(requests)} gpus={os.environ.get('CUDA_VISIBLE_DEVICES')}"
        self._write_lines(f"{request.request_id} {about}" for request in requests)
        return ["NaN in latents" if "NaN" in one.prompt else None for one in requests], elapsed_s

    def _decoded(
        self, requests: Sequence[RenderRequest], errors: Sequence[str | None], denoise_s: float
    ) -> Rendered:
        black = ["VAE overflow" if "black" in request.prompt else None for request in requests]
        return Rendered(
            pixels=[self._pixels(request) for request in requests],
            warnings=[None] * len(requests),
            encode_s=0.0,
            denoise_s=denoise_s,
            decode_s=0.0,
            peak_vram_bytes=None,
            profile=PROFILES[self._profile],
            dtype="float32",
            errors=[error or late for error, late in zip(errors, black, strict=True)],
            audio=[
                None if one.video is None or "silent" in one.prompt else clip_audio()
                for one in requests
            ],
        )

    def _fail(self, prompt: str) -> None:
        if "raise" in prompt:
            raise ValueError(f"cannot render {prompt!r}")
        if "lose the GPU" in prompt:
            raise EngineError("the GPU failed")
        if "die" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "crash" in prompt:
            ctypes.string_at(0)
        while "hang" in prompt:
            time.sleep(1)

    def _write_lines(self, lines: Iterable[str]) -> None:
        with self._log.open("a") as log:
            log.writelines(f"{line}\n" for line in lines)

    def _pixels(self, request: RenderRequest) -> np.ndarray:
        shape = (request.height, request.width, 3)
        if request.video is not None:
            shape = (request.video.num_frames, *shape)
        return np.random.default_rng(request.seed).integers(0, 256, shape, dtype=np.uint8)


class UnstartableRenderer:
    """Fails to load, every time."""

    def __init__(self, **arguments: object) -> None:
        pass

    def start(self) -> str:
        raise RuntimeError("no such device")


def _embeds(key: TextKey) -> np.ndarray:
    """An embedding that says whose it is."""
    return np.frombuffer(key.text.encode() or b"\0", np.uint8)


def _check_embeds(requests: Sequence[RenderRequest], embeds: Mapping[TextKey, Payload]) -> None:
    for request in requests:
        for key in texts_of(request):
            one = embeds[key]
            if not isinstance(one, np.ndarray) or not np.array_equal(one, _embeds(key)):
                raise ValueError(f"{key.text!r}: the embedding is another text's")


def _warnings(requests: Sequence[RenderRequest]) -> list[str | None]:
    return ["cut" if "long" in request.prompt else None for request in requests]
