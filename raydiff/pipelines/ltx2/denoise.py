"""The denoising of one batch of clips: noise, first frames, one stage or two."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raydiff.diffusion.flow_match import (
    DISTILLED_SIGMAS,
    REFINE_SIGMAS,
    FlowMatchSteps,
    add_noise,
)
from raydiff.diffusion.noise import draw, row_generators
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import Residency
from raydiff.models.ltx2.connectors import TextEmbeds
from raydiff.models.ltx2.rope import LatentSize
from raydiff.models.ltx2.transformer import LTX2Context, LTX2Transformer
from raydiff.pipelines.ltx2.components import LTX2Components, LTX2Embeds, pack, unpack
from raydiff.pipelines.ltx2.first_frame import fit_first_frame, read_first_frame
from raydiff.pipelines.ltx2.guided import GuidedTransformer, negative_rows
from raydiff.pipelines.ltx2.text import connect_texts
from raydiff.request import RenderRequest, row_guidance
from raydiff.video_settings import RowGuidance, VideoSettings

SPARE_SHARE = 0.1
"""Of the GPU's free memory, what texts' keys and values may take to spare each step their work."""


class Tokens(NamedTuple):
    """Packed latents, float32."""

    video: Tensor  # (B, N, C)
    audio: Tensor  # (B, M, C')


class Denoising:
    """One batch on its way from noise to latents; `settings` are those that its
    clips share: mode, length and frame rate; `size` is that of its finished clips."""

    def __init__(
        self,
        parts: LTX2Components,
        residency: Residency,
        profile: Profile,
        requests: Sequence[RenderRequest],
        embeds: LTX2Embeds,
        *,
        settings: VideoSettings,
        size: LatentSize,
    ) -> None:
        self._parts = parts
        self._residency = residency
        self._is_sequential = profile.guidance == "sequential"
        self._settings = settings
        self._requests = requests
        self._embeds = embeds
        self._size = size
        self._num_audio_tokens = parts.audio_config.num_latents(
            settings.num_frames, settings.frame_rate
        )
        self._transformer = parts.needed(parts.transformer, "denoise")
        self._vae = parts.needed(parts.vae, "denoise")
        self._device = residency.device_of("transformer")
        self._generators = row_generators([request.seed for request in requests])
        self._images = [
            None if request.init_image is None else read_first_frame(request.init_image)
            for request in requests
        ]
        self._texts = self._connect_texts()
        self._sums: list[Tensor] = []

    def whole(self) -> Tokens:
        """Denoise at the clips' own size, from noise alone."""
        return self._first_stage(self._size)

    def in_two_stages(self) -> Tokens:
        """Denoise at half the size, enlarge, and denoise once more from partial noise.

        The second stage is without guidance. Its sound is kept of a distilled checkpoint alone:
        of another the first stage's is better, which had guidance and all the steps.
        """
        half = LatentSize(self._size.num_frames, self._size.height // 2, self._size.width // 2)
        first = self._first_stage(half)
        second = self._second_stage(Tokens(self._enlarge(first.video, half), first.audio))
        return second if self._settings.is_distilled else Tokens(second.video, first.audio)

    def errors(self) -> tuple[str | None, ...]:
        """Say after which step a row was not finite, from the sums after each."""
        is_finite = torch.stack(self._sums).isfinite().cpu().numpy()  # (steps, B)
        return tuple(
            None
            if row[-1]
            else f"NaN in latents after step {row.argmin() + 1}. Try a lower guidance_scale, "
            "stg_scale or modality_scale, and check the checkpoint's files."
            for row in is_finite.T
        )

    def _first_stage(self, size: LatentSize) -> Tokens:
        channels = self._vae.config.latent_channels
        audio = self._parts.audio_config
        audio_shape = (audio.latent_channels, self._num_audio_tokens, audio.latent_mel_bins)
        # Video before audio, each as unpacked latents: the reference's order of draws.
        video_noise = pack(draw(self._generators, (channels, *size)))
        audio_noise = draw(self._generators, audio_shape).transpose(1, 2).flatten(2)
        guidance = [row_guidance(request) for request in self._requests]
        return self._walk(
            self._transformer,
            "transformer",
            Tokens(video_noise.to(self._device), audio_noise.to(self._device)),
            size=size,
            guidance=guidance,
            schedules=[self._schedule(request, size) for request in self._requests],
        )

    def _second_stage(self, clean: Tokens) -> Tokens:
        noise = Tokens(self._second_video_noise(), draw(self._generators, clean.audio.shape[1:]))
        noisy = [
            add_noise(tokens, drawn.to(self._device), REFINE_SIGMAS[0])
            for tokens, drawn in zip(clean, noise, strict=True)
        ]
        has_own = self._parts.refine_transformer is not None
        return self._walk(
            self._parts.refine_transformer or self._transformer,
            "refine_transformer" if has_own else "transformer",
            Tokens(*noisy),
            size=self._size,
            guidance=[RowGuidance()] * len(self._requests),
            schedules=[REFINE_SIGMAS] * len(self._requests),
        )

    def _second_video_noise(self) -> Tensor:
        """Draw as the reference does: for packed latents, but for unpacked ones in img2vid."""
        channels, num_tokens = self._vae.config.latent_channels, _num_tokens(self._size)
        rows = [
            draw([generator], (num_tokens, channels))
            if image is None
            else pack(draw([generator], (channels, *self._size)))
            for image, generator in zip(self._images, self._generators, strict=True)
        ]
        return torch.cat(rows)

    def _schedule(self, request: RenderRequest, size: LatentSize) -> tuple[float, ...]:
        if self._settings.is_distilled:
            return DISTILLED_SIGMAS
        return self._parts.schedule.sigmas(request.num_inference_steps, _num_tokens(size))

    def _walk(
        self,
        transformer: LTX2Transformer,
        component: str,
        noisy: Tokens,
        *,
        size: LatentSize,
        guidance: Sequence[RowGuidance],
        schedules: Sequence[Sequence[float]],
    ) -> Tokens:
        """Take all rows along their schedules; first frames lie clean where they are given."""
        video, audio = self._with_first_frames(noisy.video, size), noisy.audio
        is_given = self._given_tokens(size)
        steps = FlowMatchSteps(schedules, self._device)
        with self._residency.on_device(component):
            predict = GuidedTransformer(
                transformer,
                self._context(transformer, size, guidance),
                guidance,
                latent_size=size,
                has_first_frame=[image is not None for image in self._images],
                is_sequential=self._is_sequential,
            )
            while not steps.is_done:
                rows = steps.row_index
                x = Tokens(video.index_select(0, rows), audio.index_select(0, rows))
                x0 = predict(x.video, x.audio, steps.sigmas, steps.rows)
                clean_video = x0.video
                if is_given is not None:
                    clean_video = torch.where(is_given[rows], x.video, clean_video)
                video = video.index_copy(0, rows, steps.euler(x.video, clean_video))
                audio = audio.index_copy(0, rows, steps.euler(x.audio, x0.audio))
                self._sums.append(video.sum(dim=(1, 2)) + audio.sum(dim=(1, 2)))
                steps.advance()
        return Tokens(video, audio)

    def _context(
        self, transformer: LTX2Transformer, size: LatentSize, guidance: Sequence[RowGuidance]
    ) -> LTX2Context:
        """Compute what the texts bring: negatives of the rows that have a use for one, then all."""
        negative = negative_rows(guidance)
        rows = [*negative, *range(len(self._requests))]
        texts: list[str] = [self._embeds.negative_prompts[row] or "" for row in negative]
        embeds = [self._texts[text] for text in (*texts, *self._embeds.prompts)]
        video, audio = (torch.cat(parts) for parts in zip(*embeds, strict=True))
        return transformer.precompute_context(
            video,
            audio,
            latent_size=size,
            num_audio_tokens=self._num_audio_tokens,
            frame_rates=[self._settings.frame_rate] * len(rows),
            keeps_keys_values=self._has_room_for(transformer.keys_values_bytes(*video.shape[:2])),
        )

    def _has_room_for(self, num_bytes: int) -> bool:
        """Whether the GPU has so much memory to spare."""
        if self._device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device)
        free -= torch.cuda.memory_allocated(self._device)
        return num_bytes <= SPARE_SHARE * free

    def _connect_texts(self) -> dict[str, TextEmbeds]:
        """Return each text's embeddings (1, S, C), on the device that denoises."""
        connectors = self._parts.needed(self._parts.connectors, "denoise")
        device = self._residency.device_of("connectors")
        with self._residency.on_device("connectors"):
            embeds = connect_texts(
                list(self._embeds.encoded.values()),
                connectors,
                self._parts.num_text_embeds,
                device,
            )
        rows = zip(*(torch.split(stream.to(self._device), 1) for stream in embeds), strict=True)
        return {
            text: TextEmbeds(*row) for text, row in zip(self._embeds.encoded, rows, strict=True)
        }

    def _with_first_frames(self, video: Tensor, size: LatentSize) -> Tensor:
        """Lay the given first frames over the first tokens of their rows."""
        scale = self._vae.config.spatial_downscale
        frames: dict[int, Tensor] = {}
        if any(image is not None for image in self._images):
            device = self._residency.device_of("vae")
            with self._residency.on_device("vae"):
                for row, image in enumerate(self._images):
                    if image is not None:
                        pixels = fit_first_frame(image, size.height * scale, size.width * scale)
                        mean = self._vae.encode(pixels.to(device)).mean.float()
                        frames[row] = pack(self._vae.normalize(mean))[0].to(video)
        for row, tokens in frames.items():
            video[row, : tokens.shape[0]] = tokens
        return video

    def _given_tokens(self, size: LatentSize) -> Tensor | None:
        """Mark the tokens of given first frames, (B, N, 1) bool; None where there are none."""
        has_image = torch.tensor([image is not None for image in self._images])
        if not has_image.any():
            return None
        is_first = torch.arange(_num_tokens(size)) < size.height * size.width
        return (has_image[:, None] & is_first)[..., None].to(self._device)

    def _enlarge(self, tokens: Tensor, size: LatentSize) -> Tensor:
        """Return the tokens at twice the height and width, row by row."""
        upsampler = self._parts.needed(self._parts.latent_upsampler, "denoise")
        device = self._residency.device_of("latent_upsampler")
        enlarged = []
        with self._residency.on_device("latent_upsampler"):
            for row in torch.split(unpack(tokens, size), 1):
                raw = upsampler(self._vae.denormalize(row.to(device)))
                enlarged.append(pack(self._vae.normalize(raw.float())))
        return torch.cat(enlarged).to(self._device)


def _num_tokens(size: LatentSize) -> int:
    return size.num_frames * size.height * size.width
