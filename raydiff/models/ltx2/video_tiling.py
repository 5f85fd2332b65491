"""Decode and encode clips in overlapping tiles of the picture and in chunks of frames: memory is
one tile's and one chunk's. Chunks change nothing; tiles blend linearly over their overlaps, without
the part next to a cut, where convolutions see padding for pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from raydiff.errors import ConfigError
from raydiff.models.autoencoder_kl import Moments
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.tiling import Tile, cover, shares


def tiled_decode(
    vae: LTX2VideoVAE, latents: Tensor, *, tile_size: int, overlap: int, num_frames: int
) -> Iterator[Tensor]:
    """Yield about `vae.decode(latents)` in order: (B, C, F, h, w) -> parts (B, 3, f, H, W).

    tile_size is the most and overlap the least, in pixels: all tiles have one size. A picture that
    fits one tile is decoded whole, and so is a clip of no more than num_frames + 1 frames.
    Raises ConfigError for sizes that are no multiples of 32 (num_frames: 8), and for an overlap as
    large as the tile.
    """
    scale = vae.config.spatial_downscale
    _check_num_frames(vae, num_frames)
    tiles = cover(latents.shape[3], latents.shape[4], tile_size, overlap, scale)
    streams = [_decode(vae, _part(latents, tile, 1), num_frames) for tile in tiles]
    return (_blend(parts, tiles, scale) for parts in zip(*streams, strict=True))


def tiled_encode(
    vae: LTX2VideoVAE, pixels: Tensor, *, tile_size: int, overlap: int, num_frames: int
) -> Moments:
    """Return about `vae.encode(pixels)`: (B, 3, 8 n + 1, H, W) -> (B, C, n + 1, h, w)."""
    scale = vae.config.spatial_downscale
    _check_num_frames(vae, num_frames)
    tiles = cover(pixels.shape[3] // scale, pixels.shape[4] // scale, tile_size, overlap, scale)
    parts = [_encode(vae, _part(pixels, tile, scale), num_frames) for tile in tiles]
    means, logvars = zip(*parts, strict=True)
    return Moments(_blend(means, tiles, 1), _blend(logvars, tiles, 1))


def _check_num_frames(vae: LTX2VideoVAE, num_frames: int) -> None:
    scale = vae.config.temporal_downscale
    if num_frames < scale or num_frames % scale:
        raise ConfigError(
            f"num_frames of a chunk is {num_frames}; this autoencoder needs a multiple of {scale}. "
            f"Use {max(1, round(num_frames / scale)) * scale}."
        )


def _part(clip: Tensor, tile: Tile, scale: int) -> Tensor:
    rows, columns = (
        slice(span.start * scale, span.stop * scale) for span in (tile.rows, tile.columns)
    )
    return clip[..., rows, columns]


def _decode(vae: LTX2VideoVAE, latents: Tensor, num_frames: int) -> Iterator[Tensor]:
    if (latents.shape[2] - 1) * vae.config.temporal_downscale <= num_frames:
        yield vae.decode(latents)
    else:
        yield from vae.decode_in_chunks(latents, num_frames)


def _encode(vae: LTX2VideoVAE, pixels: Tensor, num_frames: int) -> Moments:
    if pixels.shape[2] - 1 <= num_frames:
        return vae.encode(pixels)
    means, logvars = zip(*vae.encode_in_chunks(pixels, num_frames), strict=True)
    return Moments(torch.cat(means, dim=2), torch.cat(logvars, dim=2))


def _blend(parts: tuple[Tensor, ...], tiles: list[Tile], scale: int) -> Tensor:
    """Sum the weighted tiles (B, C, F, h, w), each `scale` times as large as its latents."""
    first, last = parts[0], tiles[-1]
    if len(parts) == 1:
        return first
    blended = first.new_zeros(
        (*first.shape[:3], last.rows.stop * scale, last.columns.stop * scale), dtype=torch.float32
    )
    for part, tile in zip(parts, tiles, strict=True):
        rows, columns = (shares(span, scale, part.device) for span in (tile.rows, tile.columns))
        _part(blended, tile, scale).add_(part * (rows[:, None] * columns))
    return blended.to(first.dtype)
