"""Decode and encode in overlapping tiles: memory is one tile's, whatever the image's size.

Attention runs untiled, at the latents' size. A first pass over the tiles gathers GroupNorm
statistics of the image, which the second uses in place of each tile's own, the main cause of seams
(as ScaleCrafter, arXiv 2310.07702). Overlaps blend linearly, without the part next to a cut, where
convolutions see zeros for pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from raydiff.errors import ConfigError
from raydiff.models.autoencoder_kl import AutoencoderKL, Moments
from raydiff.models.group_norm import GroupNorm

UNUSED_OVERLAP = 0.25
"""Part of an overlap, at each end, that only the tile with more context fills."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A tile's stretch of rows or columns, in latents; None where the image itself ends."""

    start: int
    stop: int
    rise: tuple[float, float] | None
    """Where this tile takes over from the one before."""
    fall: tuple[float, float] | None
    """Where the next one takes over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A rectangle of the latents."""

    rows: Span
    columns: Span


def tiled_decode(vae: AutoencoderKL, latents: Tensor, *, tile_size: int, overlap: int) -> Tensor:
    """Return about `vae.decode(latents)`: (B, C, h, w) -> (B, 3, H, W), image by image.

    tile_size is the most and overlap the least, in pixels: all tiles have one size, so that they
    share kernels and none is a sliver. An image that fits one tile is decoded whole.
    Raises ConfigError for a size that is no multiple of 8 and an overlap as large as the tile.
    """
    scale = vae.config.downscale
    tiles = cover(latents.shape[2], latents.shape[3], tile_size, overlap, scale)
    if len(tiles) == 1:
        return vae.decode(latents)
    images = []
    for image in latents.split(1):
        run = partial(_upsample, vae, vae.expand(image))
        images.append(_blend(vae, run, tiles, scale))
    return torch.cat(images)


def tiled_encode(vae: AutoencoderKL, pixels: Tensor, *, tile_size: int, overlap: int) -> Moments:
    """Return about `vae.encode(pixels)`: (B, 3, H, W) -> (B, C, h, w); see `tiled_decode`."""
    scale = vae.config.downscale
    height, width = pixels.shape[2] // scale, pixels.shape[3] // scale
    tiles = cover(height, width, tile_size, overlap, scale)
    if len(tiles) == 1:
        return vae.encode(pixels)
    moments = []
    for image in pixels.split(1):
        run = partial(_downsample, vae, image)
        moments.append(vae.moments(_blend(vae, run, tiles, 1)))
    return Moments(*map(torch.cat, zip(*moments, strict=True)))


def _upsample(vae: AutoencoderKL, hidden: Tensor, tile: Tile) -> Tensor:
    rows, columns = tile.rows, tile.columns
    return vae.upsample(hidden[:, :, rows.start : rows.stop, columns.start : columns.stop])


def _downsample(vae: AutoencoderKL, pixels: Tensor, tile: Tile) -> Tensor:
    scale = vae.config.downscale
    rows, columns = (
        # The last tile takes in the pixels that are too few for a latent of their own.
        slice(span.start * scale, None if span.fall is None else span.stop * scale)
        for span in (tile.rows, tile.columns)
    )
    return vae.downsample(pixels[:, :, rows, columns])


def cover(height: int, width: int, tile_size: int, overlap: int, scale: int) -> list[Tile]:
    for name, value in (("tile_size", tile_size), ("overlap", overlap)):
        if value % scale:
            raise ConfigError(
                f"{name} is {value}; this autoencoder needs a multiple of {scale}. "
                f"Use {value // scale * scale} or {(value // scale + 1) * scale}."
            )
    if not 0 <= overlap < tile_size:
        raise ConfigError(
            f"overlap is {overlap} and tile_size {tile_size}; an overlap is at least 0 and less "
            f"than the tile. Use {tile_size // 4 // scale * scale}."
        )
    rows, columns = (_spans(size, tile_size // scale, overlap // scale) for size in (height, width))
    return [Tile(rows=row, columns=column) for row, column in product(rows, columns)]


def _spans(size: int, tile: int, overlap: int) -> list[Span]:
    """Cut `size` into the fewest stretches, of one length up to `tile`, that overlap enough."""
    if size <= tile:
        return [Span(start=0, stop=size, rise=None, fall=None)]
    num_steps = math.ceil((size - tile) / (tile - overlap))
    tile = math.ceil((size + num_steps * overlap) / (num_steps + 1))
    starts = [round(step * (size - tile) / num_steps) for step in range(num_steps + 1)]
    ramps = [_ramp(right, left + tile) for left, right in pairwise(starts)]
    return [
        Span(start=start, stop=start + tile, rise=rise, fall=fall)
        for start, rise, fall in zip(starts, [None, *ramps], [*ramps, None], strict=True)
    ]


def _ramp(start: int, stop: int) -> tuple[float, float]:
    unused = UNUSED_OVERLAP * (stop - start)
    return start + unused, stop - unused


def _blend(
    vae: AutoencoderKL, run: Callable[[Tile], Tensor], tiles: Sequence[Tile], scale: int
) -> Tensor:
    """Sum the weighted tiles of one image, each `scale` times as large as its latents."""
    norms = [module for module in vae.modules() if isinstance(module, GroupNorm)]
    sums: dict[GroupNorm, Tensor] = {}
    for tile in tiles:
        with _hooked(norms, partial(_gather, sums, tile)):
            run(tile)
    height, width = tiles[-1].rows.stop * scale, tiles[-1].columns.stop * scale
    with _hooked(norms, partial(_normalize, sums)):
        for tile in tiles:
            part = run(tile)
            if tile is tiles[0]:
                blended = part.new_zeros(1, part.shape[1], height, width, dtype=torch.float32)
            rows, columns = (
                slice(span.start * scale, span.stop * scale) for span in (tile.rows, tile.columns)
            )
            row_weights, column_weights = (
                shares(span, scale, part.device) for span in (tile.rows, tile.columns)
            )
            weights = row_weights[:, None] * column_weights
            blended[:, :, rows, columns] += part * weights
    return blended.to(part.dtype)


def shares(span: Span, scale: int, device: torch.device) -> Tensor:
    """A tile's share of each row or column of the output; the shares of all tiles add up to 1."""
    length = (span.stop - span.start) * scale
    positions = span.start + (torch.arange(length, device=device) + 0.5) / scale
    rise, fall = (
        positions.sub(ramp[0]).div(max(ramp[1] - ramp[0], 1e-6)).clamp(0, 1) if ramp else None
        for ramp in (span.rise, span.fall)
    )
    weights = torch.ones_like(positions) if rise is None else rise
    return weights if fall is None else weights - fall


Hook = Callable[[GroupNorm, tuple[Tensor, ...], Tensor], Tensor | None]


@contextmanager
def _hooked(norms: Sequence[GroupNorm], hook: Hook) -> Iterator[None]:
    handles = [norm.register_forward_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gather(
    sums: dict[GroupNorm, Tensor],
    tile: Tile,
    norm: GroupNorm,
    args: tuple[Tensor, ...],
    _output: Tensor,
) -> None:
    """Add count, sum and sum of squares of each group, over the tile's own part of the image."""
    x = _shifted(*args)
    core = x[:, :, _core(tile.rows, x.shape[2]), _core(tile.columns, x.shape[3])]
    groups = core.unflatten(1, (norm.num_groups, -1))  # (1, G, C / G, h, w)
    dims = (0, 2, 3, 4)
    total = groups.sum(dims, dtype=torch.float32)
    square = torch.linalg.vector_norm(groups, dim=dims, dtype=torch.float32) ** 2
    count = torch.full_like(total, groups.numel() / norm.num_groups)
    gathered = torch.stack((count, total, square))  # (3, G)
    sums[norm] = sums[norm] + gathered if norm in sums else gathered


def _shifted(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """What a GroupNorm called with these arguments normalises."""
    return x if shift is None else x + shift[..., None, None]


def _core(span: Span, length: int) -> slice:
    """The part of a map `length` long that no other tile's core covers: to the ramps' middles."""
    per_latent = length / (span.stop - span.start)
    start = 0 if span.rise is None else round((sum(span.rise) / 2 - span.start) * per_latent)
    stop = length if span.fall is None else round((sum(span.fall) / 2 - span.start) * per_latent)
    return slice(start, stop)


def _normalize(
    sums: dict[GroupNorm, Tensor], norm: GroupNorm, args: tuple[Tensor, ...], _output: Tensor
) -> Tensor:
    """What the norm gives with the whole image's statistics."""
    x = _shifted(*args)
    count, total, square = sums[norm]
    mean = total / count
    variance = (square / count - mean**2).clamp(min=0)
    mean, variance = (
        group.repeat_interleave(x.shape[1] // norm.num_groups) for group in (mean, variance)
    )
    weight, bias = norm.weight.float(), norm.bias.float()
    x = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=norm.eps)
    return F.silu(x, inplace=True) if norm.silu else x
