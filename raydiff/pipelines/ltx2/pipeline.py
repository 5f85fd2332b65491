"""LTX-2: prompts to clips with sound, in one stage or two, from noise or from a first frame.

requests -> encode: LTX2Embeds -> denoise: ClipLatents -> decode: frames and sound
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.errors import RowError
from raydiff.manifest.schema import quoted
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import Residency
from raydiff.models.ltx2.rope import LatentSize
from raydiff.models.ltx2.vocoder import Vocoder, VocoderWithBWE
from raydiff.output.video.audio import Audio
from raydiff.pipelines.base import Decoded, Denoised, Pipeline, joined
from raydiff.pipelines.ltx2.components import ClipLatents, LTX2Components, LTX2Embeds, unpack
from raydiff.pipelines.ltx2.decoder import ClipDecoder
from raydiff.pipelines.ltx2.denoise import Denoising
from raydiff.pipelines.ltx2.text import GemmaTexts
from raydiff.pipelines.prompt_cache import EncodedPrompt, PromptCache
from raydiff.pipelines.text_backends import UNREAD, TextBackend
from raydiff.request import ModelInfo, RenderRequest, batch_key, row_guidance, video_settings


class LTX2Pipeline(Pipeline):
    """LTX-2.0 and 2.3, resident. Build it with `raydiff.load_pipeline`."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        components: LTX2Components,
        profile: Profile,
        dtype: torch.dtype,
        texts: TextBackend | None = None,
        is_compiled: bool = False,
    ) -> None:
        """`texts`: where the features of texts come from; None is the checkpoint's own Gemma."""
        self.info = info
        self.parts = components
        self.profile = profile
        self.dtype = dtype
        modules = components.modules
        self._residency = Residency(modules, profile)
        self.device = self._residency.device_of(next(iter(modules), "text_encoder"))
        self._texts = texts or GemmaTexts(components, self._residency)
        self._prompts = PromptCache()
        if is_compiled and profile.cleanup != "step":  # There each layer's weights come in turn.
            for transformer in components.transformers:
                transformer.compile_blocks()

    @torch.inference_mode()
    def encode(self, requests: Sequence[RenderRequest]) -> LTX2Embeds:
        """Encode the prompts and negative prompts of all requests, each distinct text once."""
        texts = [text for request in requests for text in _texts(request)]
        return self.gather(requests, self._prompts.get_or_encode(texts, self._texts.encode))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode texts into host memory; each gets what it would get alone."""
        return [encoded.on_host() for encoded in self._texts.encode(texts)]

    def gather(
        self, requests: Sequence[RenderRequest], encoded: Mapping[str, EncodedPrompt]
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
            warnings=tuple(
                joined(_noise_warning(request), self._truncation_warning(request, encoded))
                for request in requests
            ),
        )

    @torch.inference_mode()
    def denoise_rows(self, requests: Sequence[RenderRequest], embeds: LTX2Embeds) -> Denoised:
        """Sample the latents of each request's seed under its own settings, and check them.

        The requests have one `BatchKey` and video_mode; their steps, guidance and first frames may
        differ. Raises ConfigError for two stages without what makes the second.
        """
        first = requests[0]
        shapes = {
            (batch_key(request)[1:], video_settings(request).video_mode) for request in requests
        }
        if len(shapes) > 1:
            raise ValueError(f"requests of shapes {sorted(shapes)}; a batch has one shape")
        video = video_settings(first)
        size = self._latent_size(first)
        with self._attention_backends():
            run = Denoising(
                self.parts,
                self._residency,
                self.profile,
                requests,
                embeds,
                settings=video,
                size=size,
            )
            tokens = run.in_two_stages() if video.has_second_stage else run.whole()
        rows = zip(unpack(tokens.video, size), tokens.audio, strict=True)
        return Denoised(tuple(ClipLatents(*row) for row in rows), run.errors())

    def decode_rows(self, latents: Sequence[ClipLatents]) -> Decoded:
        """Decode each clip's frames (F, H, W, 3) uint8 and its sound, and check them."""
        vocoder = self.parts.needed(self.parts.vocoder, "decode")
        decoder = ClipDecoder(
            self.parts.needed(self.parts.vae, "decode"),
            self.parts.needed(self.parts.audio_vae, "decode"),
            cast("Vocoder | VocoderWithBWE", vocoder),
            self._residency,
        )
        clips = [self._clip(decoder, *row) for row in latents]
        return Decoded(
            pixels=[clip.frames for clip in clips],
            audio=[clip.audio for clip in clips],
            warnings=[None] * len(clips),
            errors=[clip.error for clip in clips],
        )

    def on_host(self, latents: ClipLatents) -> ClipLatents:
        """Return a copy of one clip's latents in host memory."""
        return ClipLatents(*(tensor.to("cpu", copy=True) for tensor in latents))

    def _clip(self, decoder: ClipDecoder, video: Tensor, audio: Tensor) -> "_Clip":
        frames = decoder.empty_frames(video)
        try:
            sound = Audio(samples=decoder.sound(audio), sample_rate=decoder.audio_sample_rate)
            num_done = 0
            # Into one array, chunk by chunk: a clip is never in memory twice.
            for chunk in decoder.frames(video, self.profile):
                frames[num_done : num_done + len(chunk)] = chunk
                num_done += len(chunk)
        except RowError as error:
            return _Clip(frames[:0], None, str(error))
        return _Clip(frames, sound, None)

    def _truncation_warning(
        self, request: RenderRequest, encoded: Mapping[str, EncodedPrompt]
    ) -> str | None:
        negative = _negative_text(request)
        cut = [
            name
            for name, text in (("prompt", request.prompt), ("negative_prompt", negative))
            if text is not None and encoded[text].is_truncated
        ]
        return f"{' and '.join(cut)} cut to {self.parts.num_text_embeds} tokens" if cut else None

    def _latent_size(self, request: RenderRequest) -> LatentSize:
        config = self.parts.needed(self.parts.vae, "denoise").config
        return LatentSize(
            (video_settings(request).num_frames - 1) // config.temporal_downscale + 1,
            request.height // config.spatial_downscale,
            request.width // config.spatial_downscale,
        )


class _Clip(NamedTuple):
    """One decoded clip, or why there is none."""

    frames: NDArray[np.uint8]
    audio: Audio | None
    error: str | None


def _noise_warning(request: RenderRequest) -> str | None:
    """Noise in the place of a text is never silent, whichever worker made it."""
    return UNREAD if video_settings(request).text_encoder == "random" else None


def _texts(request: RenderRequest) -> list[str]:
    """Return what has to be encoded for a request."""
    negative = _negative_text(request)
    return [request.prompt] if negative is None else [request.prompt, negative]


def _negative_text(request: RenderRequest) -> str | None:
    """Return the text of the request's pass under a negative prompt, None without the pass."""
    return (request.negative_prompt or "") if "negative" in row_guidance(request).passes else None
