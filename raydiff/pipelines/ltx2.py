"""LTX-2: prompts to clips with sound, in one stage or two, from noise or from a first frame.

requests -> encode: LTX2Embeds -> denoise: DenoisedClips -> decode: frames and sound
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from raydiff.diffusion.flow_match import REFINE_SIGMAS
from raydiff.errors import ConfigError, RowError
from raydiff.manifest.schema import quoted
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import Residency
from raydiff.models.ltx2.rope import LatentSize
from raydiff.models.ltx2.vocoder import Vocoder, VocoderWithBWE
from raydiff.pipelines.ltx2_components import (
    ClipLatents,
    DenoisedClips,
    LTX2Components,
    LTX2Embeds,
    unpack,
)
from raydiff.pipelines.ltx2_decoder import ClipDecoder
from raydiff.pipelines.ltx2_denoise import Denoising
from raydiff.pipelines.ltx2_request import (
    LTX2Request,
    Mode,
    check_request,
    default_values,
    has_second_stage,
)
from raydiff.pipelines.ltx2_text import encode_text
from raydiff.pipelines.prompt_cache import EncodedPrompt, PromptCache
from raydiff.pipelines.stable_diffusion import ATTENTION_BACKENDS

NUM_BATCH_TOKENS = 16384
"""Video tokens of a batch: with more an H200 is no faster, and others run out of memory sooner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One request's clip."""

    frames: Iterator[NDArray[np.uint8]]
    """(f, H, W, 3) in order, decoded as they are asked for; RowError where they are not finite."""
    audio: NDArray[np.float32]
    """(2, samples) in -1..1; a few milliseconds longer or shorter than the frames."""
    audio_sample_rate: int
    error: str | None
    """Why there is no clip; frames and audio are empty then."""


class LTX2Pipeline:
    """LTX-2.0 and 2.3, resident. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        *,
        components: LTX2Components,
        profile: Profile,
        mode: Mode,
        dtype: torch.dtype,
    ) -> None:
        """Raises ConfigError where two stages are asked for without what makes the second."""
        if has_second_stage(mode) and components.transformer and not components.latent_upsampler:
            raise ConfigError(
                f"ltx2.mode is {mode}; that needs a latent upsampler, which this checkpoint is "
                "without. Use another mode, or add the folder latent_upsampler to the checkpoint."
            )
        self.parts = components
        self.profile = profile
        self.mode: Mode = mode
        self.dtype = dtype
        modules = components.modules
        self._residency = Residency(modules, profile)
        self.device = self._residency.device_of(next(iter(modules)))
        self._prompts = PromptCache()

    def request(self, prompt: str, **values: Any) -> LTX2Request:
        """Return a request with the official pipeline's values where none is given.

        height, width, num_frames, frame_rate and seed are to be given. Raises RowError for a clip
        that cannot be made.
        """
        transformer = self.parts.needed(self.parts.transformer, "denoise")
        given = {name: value for name, value in values.items() if value is not None}
        defaults = {"negative_prompt": None, **default_values(transformer.config, self.mode)}
        request = LTX2Request(prompt=prompt, **{**defaults, **given})
        config = self.parts.needed(self.parts.vae, "denoise").config
        check_request(
            request,
            self.mode,
            spatial_downscale=config.spatial_downscale,
            temporal_downscale=config.temporal_downscale,
            num_layers=transformer.config.num_layers,
        )
        return request

    def max_batch_size(self, request: LTX2Request) -> int:
        """Return how many clips of this size may share a batch, one at least."""
        size = self._latent_size(request)
        return max(1, NUM_BATCH_TOKENS // (size.num_frames * size.height * size.width))

    def batch_shape(self, request: LTX2Request) -> tuple[int, ...]:
        """Return what requests must have in common to share a batch."""
        return *self._latent_size(request), self._num_audio_tokens(request)

    @torch.inference_mode()
    def encode(self, requests: Sequence[LTX2Request]) -> LTX2Embeds:
        """Encode the prompts and negative prompts of all requests, each distinct text once."""
        texts = [text for request in requests for text in _texts(request)]
        return self.gather(requests, self._prompts.get_or_encode(texts, self._encode_texts))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode texts into host memory; each gets what it would get alone."""
        return [encoded.on_host() for encoded in self._encode_texts(texts)]

    def gather(
        self, requests: Sequence[LTX2Request], encoded: Mapping[str, EncodedPrompt]
    ) -> LTX2Embeds:
        """Return what `encode` does, of texts that are encoded already.

        Raises RowError for a request with a text that `encoded` does not have.
        """
        texts = {text: None for request in requests for text in _texts(request)}
        for text in texts:
            if text not in encoded:
                raise RowError(f"the embeddings of {quoted(text)} did not come with its row")
        return LTX2Embeds(
            prompts=tuple(request.prompt for request in requests),
            negative_prompts=tuple(map(_negative_text, requests)),
            encoded={text: encoded[text] for text in texts},
            warnings=tuple(self._truncation_warning(request, encoded) for request in requests),
        )

    @torch.inference_mode()
    def denoise(self, requests: Sequence[LTX2Request], embeds: LTX2Embeds) -> DenoisedClips:
        """Sample the latents of each request's seed under its own settings, and check them.

        The requests have one `batch_shape`; their steps, guidance and first frames may differ.
        """
        shapes = {self.batch_shape(request) for request in requests}
        if len(shapes) > 1:
            raise ValueError(f"requests of shapes {sorted(shapes)}; a batch has one shape")
        size = self._latent_size(requests[0])
        with self._attention_backends():
            run = Denoising(
                self.parts,
                self._residency,
                self.profile,
                self.mode,
                requests,
                embeds,
                size=size,
                num_audio_tokens=self._num_audio_tokens(requests[0]),
            )
            tokens = run.in_two_stages() if has_second_stage(self.mode) else run.whole()
        return DenoisedClips(
            latents=ClipLatents(unpack(tokens.video, size), tokens.audio),
            errors=run.errors(),
            num_evaluations=tuple(map(self.num_evaluations, requests)),
        )

    def decode(self, denoised: DenoisedClips) -> Iterator[Clip]:
        """Yield the clip of each row; its frames are to be taken before the next clip."""
        vocoder = self.parts.needed(self.parts.vocoder, "decode")
        decoder = ClipDecoder(
            self.parts.needed(self.parts.vae, "decode"),
            self.parts.needed(self.parts.audio_vae, "decode"),
            cast("Vocoder | VocoderWithBWE", vocoder),
            self._residency,
        )
        for video, audio, error in zip(*denoised.latents, denoised.errors, strict=True):
            yield self._clip(decoder, video, audio, error)

    def render(
        self,
        requests: Sequence[LTX2Request],
        encoded: Mapping[str, EncodedPrompt] | None = None,
    ) -> Iterator[Clip]:
        """Run the stages; with `encoded` texts, all but the first. See `decode`."""
        embeds = self.encode(requests) if encoded is None else self.gather(requests, encoded)
        return self.decode(self.denoise(requests, embeds))

    def num_evaluations(self, request: LTX2Request) -> int:
        """Return the request's NFE: forward passes of the transformer for it, in all stages."""
        first = request.guidance.num_evaluations(request.num_inference_steps)
        return first + (len(REFINE_SIGMAS) - 1 if has_second_stage(self.mode) else 0)

    def _clip(self, decoder: ClipDecoder, video: Tensor, audio: Tensor, error: str | None) -> Clip:
        sound = np.zeros((2, 0), np.float32)
        if error is None:
            try:
                sound = decoder.sound(audio)
            except RowError as failure:
                error = str(failure)
        frames = iter(()) if error is not None else decoder.frames(video, self.profile)
        return Clip(
            frames=frames, audio=sound, audio_sample_rate=decoder.audio_sample_rate, error=error
        )

    def _encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        tokenizer = self.parts.needed(self.parts.tokenizer, "encode")
        encoder = self.parts.needed(self.parts.text_encoder, "encode")
        connectors = self.parts.needed(self.parts.connectors, "encode")
        device = self._residency.device_of("text_encoder")
        with self._residency.on_device("text_encoder", "connectors"):
            return [encode_text(text, tokenizer, encoder, connectors, device) for text in texts]

    def _truncation_warning(
        self, request: LTX2Request, encoded: Mapping[str, EncodedPrompt]
    ) -> str | None:
        negative = _negative_text(request)
        cut = [
            name
            for name, text in (("prompt", request.prompt), ("negative_prompt", negative))
            if text is not None and encoded[text].is_truncated
        ]
        return f"{' and '.join(cut)} cut to {self.parts.num_text_embeds} tokens" if cut else None

    def _latent_size(self, request: LTX2Request) -> LatentSize:
        config = self.parts.needed(self.parts.vae, "denoise").config
        return LatentSize(
            (request.num_frames - 1) // config.temporal_downscale + 1,
            request.height // config.spatial_downscale,
            request.width // config.spatial_downscale,
        )

    def _num_audio_tokens(self, request: LTX2Request) -> int:
        return self.parts.audio_config.num_latents(request.num_frames, request.frame_rate)

    def _attention_backends(self) -> AbstractContextManager[None]:
        if self.device.type == "cuda":
            return sdpa_kernel(ATTENTION_BACKENDS, set_priority=True)
        return nullcontext()


def _texts(request: LTX2Request) -> list[str]:
    """Return what has to be encoded for a request."""
    negative = _negative_text(request)
    return [request.prompt] if negative is None else [request.prompt, negative]


def _negative_text(request: LTX2Request) -> str | None:
    """Return the text of the request's pass under a negative prompt, None without the pass."""
    return (request.negative_prompt or "") if "negative" in request.guidance.passes else None
