"""Images as file bytes, with the request inside so that a file alone says how to make it again.

PNG carries it as an iTXt chunk `raydiff`, JPEG and WebP as the EXIF UserComment (UTF-16BE, as
most viewers of generated images read it). Equal pixels and metadata give equal bytes.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from raydiff.config import OutputConfig
from raydiff.errors import OutputError

PNG_KEYWORD = "raydiff"
USER_COMMENT = ExifTags.Base.UserComment
UNICODE_COMMENT = b"UNICODE\0"
MAX_JPEG_COMMENT_BYTES = 60_000
"""A JPEG segment ends at 65,533 bytes; the rest is for the EXIF headers."""
LONG_TEXTS = ("prompt", "negative_prompt")


def encode_image(
    pixels: NDArray[np.uint8], *, config: OutputConfig, metadata: dict[str, Any] | None
) -> bytes:
    """Return `pixels` (H, W, 3) as the bytes of a file in the format of `config.image`.

    Pillow's PNG and WebP encoders let go of the interpreter lock, so threads encode side by
    side; its JPEG encoder keeps it, for about 3 ms per megapixel.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"pixels are {pixels.dtype} of shape {pixels.shape}; expected uint8 (H, W, 3)"
        )
    image = Image.fromarray(pixels)
    if config.strip_metadata:
        metadata = None
    buffer = io.BytesIO()
    if config.image == "png":
        text = None if metadata is None else _png_text(metadata)
        image.save(buffer, "PNG", compress_level=config.png_compression, pnginfo=text)
    else:
        is_jpeg = config.image == "jpg"
        exif = None if metadata is None else _exif(metadata, is_jpeg=is_jpeg)
        options = {} if exif is None else {"exif": exif}
        image.save(buffer, "JPEG" if is_jpeg else "WEBP", quality=config.quality, **options)
    return buffer.getvalue()


def read_image_metadata(path: str | Path) -> dict[str, Any] | None:
    """Return the request inside an image file, or None if it carries none.

    Raises OutputError if the file cannot be read as a PNG, JPEG or WebP image.
    """
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.format == "PNG":
                text = image.info.get(PNG_KEYWORD)
            else:
                text = _user_comment(image.getexif())
    except UnidentifiedImageError:
        raise OutputError(f"{path}: not a PNG, JPEG or WebP image") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(text, str):
        return None
    try:
        metadata = json.loads(text)
    except ValueError:
        return None
    return metadata if isinstance(metadata, dict) else None


def metadata_json(metadata: dict[str, Any]) -> str:
    """Return a request as the text that a file carries, always valid UTF-8."""
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate (a prompt from a non-UTF-8 command line) becomes its JSON escape.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _png_text(metadata: dict[str, Any]) -> PngInfo:
    info = PngInfo()
    info.add_itxt(PNG_KEYWORD, metadata_json(metadata))
    return info


def _exif(metadata: dict[str, Any], *, is_jpeg: bool) -> Image.Exif:
    comment = metadata_json(metadata).encode("utf-16-be")
    limit = 16_384
    while is_jpeg and len(comment) > MAX_JPEG_COMMENT_BYTES and limit:
        comment = metadata_json(_shorten(metadata, limit)).encode("utf-16-be")
        limit //= 2
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[USER_COMMENT] = UNICODE_COMMENT + comment
    return exif


def _shorten(metadata: dict[str, Any], limit: int) -> dict[str, Any]:
    """Cut the prompts to `limit` characters; the metadata table still has them whole."""
    cut = {key: metadata[key][:limit] for key in LONG_TEXTS if metadata.get(key)}
    return {**metadata, **cut, "is_truncated": True}


def _user_comment(exif: Image.Exif) -> str | None:
    value = exif.get_ifd(ExifTags.IFD.Exif).get(USER_COMMENT)
    if not isinstance(value, bytes) or not value.startswith(UNICODE_COMMENT):
        return None
    return value.removeprefix(UNICODE_COMMENT).decode("utf-16-be", "replace")
