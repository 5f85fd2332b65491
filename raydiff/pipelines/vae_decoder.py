"""Latents to pixels under a memory profile, and a second try in float32 for what overflowed."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raydiff.batching import padded_size
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import Residency
from raydiff.models.autoencoder_kl import AutoencoderKL
from raydiff.models.tiling import tiled_decode
from raydiff.pipelines.base import Decoded

VAE_TILE = 512
VAE_TILE_OVERLAP = 64
"""Tiles of images too large to decode whole, in pixels."""

NOT_FINITE = "NaN or infinity"
BLACK = "a wholly black image"


class VAEDecoder:
    """One VAE's decoder: whole or in tiles, as many images at once as the profile lets it."""

    def __init__(self, vae: AutoencoderKL, residency: Residency, *, is_compiled: bool) -> None:
        self._vae = vae
        self._residency = residency
        self._is_compiled = is_compiled
        self._decode: Callable[[Tensor], Tensor] = vae.decode
        if is_compiled:
            self._decode = torch.compile(vae.decode, fullgraph=True, dynamic=False)
        self._float32: VAEDecoder | None = None

    def decode(self, latents: Tensor, profile: Profile) -> Decoded:
        """Decode latents (B, C, h, w) to pixels (B, H, W, 3) uint8.

        A row that is not finite or black, though its latents are neither, is decoded again in
        float32. Where that does not help, or was what failed, the row has an error.
        """
        pixels, flaws = self._run(latents, profile)
        warnings: list[str | None] = [None] * len(flaws)
        errors: list[str | None] = [None] * len(flaws)
        dtype = str(self._vae.dtype).removeprefix("torch.")
        for row, flaw in enumerate(flaws):
            if flaw is None:
                continue
            first_flaw = flaw
            if dtype != "float32":
                again, (flaw,) = self._in_float32(profile)._run(latents[row : row + 1], profile)
                pixels[row] = again[0]
            if flaw is None:
                warnings[row] = f"decoded in float32: in {dtype} the VAE made {first_flaw} of it"
            else:
                errors[row] = (
                    f"VAE overflow: the VAE made {flaw} of good latents, in float32 too. "
                    "Try another seed or guidance_scale, and check the checkpoint's VAE."
                )
        return Decoded(pixels, tuple(warnings), tuple(errors))

    def _run(self, latents: Tensor, profile: Profile) -> tuple[np.ndarray, list[str | None]]:
        """Return pixels, and what is wrong with each row."""
        device = self._residency.device_of("vae")
        pixels_per_image = latents.shape[-2] * latents.shape[-1] * self._vae.config.downscale**2
        images_at_once = max(1, profile.vae_batch_pixels // pixels_per_image)
        decoded, sums = [], []
        with self._residency.on_device("vae"):
            for chunk in torch.split(latents, images_at_once):
                raw = self._vae.denormalize(chunk.to(device)).to(self._vae.dtype)
                image = self._decode_raw(raw, pixels_per_image, profile.vae_tile_pixels)
                # Of the colours before they are rounded: as uint8, NaN is black.
                sums.append(image.sum(dim=(1, 2, 3), dtype=torch.float32))
                decoded.append(_to_uint8(image).cpu())
            are_finite = torch.cat(sums).isfinite().tolist()
        pixels = torch.cat(decoded).numpy()
        return pixels, [
            self._flaw(pixels[row], latents[row], is_finite)
            for row, is_finite in enumerate(are_finite)
        ]

    def _flaw(self, pixels: np.ndarray, latents: Tensor, is_finite: bool) -> str | None:
        if not is_finite:
            return NOT_FINITE
        return BLACK if not pixels.any() and bool(latents.any()) else None

    def _decode_raw(self, raw: Tensor, pixels_per_image: int, tile_pixels: int | None) -> Tensor:
        if tile_pixels is not None and pixels_per_image > tile_pixels:
            return tiled_decode(self._vae, raw, tile_size=VAE_TILE, overlap=VAE_TILE_OVERLAP)
        if not self._is_compiled:
            return self._decode(raw)
        padding = padded_size(len(raw)) - len(raw)
        return self._decode(torch.cat([raw, raw[-1:].expand(padding, -1, -1, -1)]))[: len(raw)]

    def _in_float32(self, profile: Profile) -> "VAEDecoder":
        """Return a decoder with float32 weights: made when first needed, on the GPU in use only."""
        if self._float32 is None:
            copy = deepcopy(self._vae).to("cpu", torch.float32)
            residency = Residency({"vae": copy}, replace(profile, cleanup="phase"))
            self._float32 = VAEDecoder(copy, residency, is_compiled=False)
        return self._float32


def _to_uint8(pixels: Tensor) -> Tensor:
    """Turn (B, 3, H, W) in -1..1 into (B, H, W, 3) uint8, rounded to the nearest level."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
