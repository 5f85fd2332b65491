"""LTX-2's latents to what is seen and heard, under a memory profile: frames in chunks, so that a
clip is never in memory as pixels, and the sound, which is small, at once.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydiff.errors import RowError
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import Residency
from raydiff.models.ltx2.audio_vae import AudioVAE
from raydiff.models.ltx2.video_tiling import tiled_decode
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.vocoder import Vocoder, VocoderWithBWE
from raydiff.pipelines.vae_decoder import VAE_TILE, VAE_TILE_OVERLAP

PIXELS_PER_IMAGE_PIXEL = 8
"""Pixels of a clip, over all frames of a chunk, that take the memory of one of an image's:
profiles count in those (350 bytes each here, near 3 kB in an image VAE)."""


class ClipDecoder:
    """The video VAE's decoder, the audio VAE's and the vocoder of one checkpoint."""

    def __init__(
        self,
        vae: LTX2VideoVAE,
        audio_vae: AudioVAE,
        vocoder: Vocoder | VocoderWithBWE,
        residency: Residency,
    ) -> None:
        self._vae = vae
        self._audio_vae = audio_vae
        self._vocoder = vocoder
        self._residency = residency

    @property
    def audio_sample_rate(self) -> int:
        """Samples per second and channel: 24,000 in 2.0 and 48,000 in 2.3."""
        return self._vocoder.config.output_sampling_rate

    def empty_frames(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return room (F, H, W, 3) for the frames of one clip's latents (C, f, h, w)."""
        config = self._vae.config
        num_frames = (latents.shape[1] - 1) * config.temporal_downscale + 1
        height, width = (size * config.spatial_downscale for size in latents.shape[2:])
        return np.empty((num_frames, height, width, 3), np.uint8)

    def frames(self, latents: Tensor, profile: Profile) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames of one clip's latents (C, F, h, w) in order: (f, H, W, 3) each.

        Raises RowError at frames that are not finite.
        """
        num_done = 0
        for part in self.pixels(latents, profile):
            # Of the colours before they are rounded: as uint8, NaN is black.
            if not part.sum(dtype=torch.float32).isfinite():
                raise RowError(
                    f"the VAE made NaN or infinity of good latents, from frame {num_done} on. "
                    "Try another seed, or --set model.vae_dtype=float32."
                )
            num_done += part.shape[0]
            levels = (part.float() / 2 + 0.5).clamp(0, 1) * 255
            yield levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    @torch.inference_mode()
    def pixels(self, latents: Tensor, profile: Profile) -> Iterator[Tensor]:
        """Yield the frames as (f, 3, H, W), about -1..1 but not clamped, in the VAE's dtype."""
        config = self._vae.config
        height, width = (size * config.spatial_downscale for size in latents.shape[2:])
        limit, tile_size = profile.vae_tile_pixels, max(height, width)
        if limit is not None and height * width > limit:
            tile_size = VAE_TILE
        area = min(height, tile_size) * min(width, tile_size)
        num_frames = profile.vae_batch_pixels * PIXELS_PER_IMAGE_PIXEL // area
        scale = config.temporal_downscale
        with self._residency.on_device("vae"):
            raw = self._vae.denormalize(latents[None].to(self._residency.device_of("vae")))
            parts = tiled_decode(
                self._vae,
                raw.to(self._vae.dtype),
                tile_size=tile_size,
                overlap=min(VAE_TILE_OVERLAP, tile_size - config.spatial_downscale),
                num_frames=max(scale, num_frames // scale * scale),
            )
            for part in parts:
                yield part[0].transpose(0, 1)  # (f, 3, H, W)

    @torch.inference_mode()
    def sound(self, tokens: Tensor) -> NDArray[np.float32]:
        """Return the sound (channels, samples) in -1..1 of one clip's tokens (M, C).

        Its length is near the clip's, not equal. Raises RowError where it is not finite.
        """
        device = self._residency.device_of("audio_vae")
        with self._residency.on_device("audio_vae", "vocoder"):
            # Denormalised before unpacking: the statistics are those of whole tokens.
            raw = self._audio_vae.unpack(self._audio_vae.denormalize(tokens[None].to(device)))
            sound = self._vocoder(self._audio_vae.decode(raw))[0].float().cpu()
        if not sound.isfinite().all():
            raise RowError(
                "the vocoder made NaN or infinity of good latents. Try another seed, and check "
                "the checkpoint's audio_vae and vocoder."
            )
        samples: NDArray[np.float32] = sound.numpy()
        return samples
