"""What a cell of a contact sheet shows: an image, a strip of a clip's frames, or an error."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from raydiff.output.frames import Pixels, read_image
from raydiff.output.media_files import MediaError, describe_media, is_clip, media_name, open_media
from raydiff.output.sheet.grid import Row
from raydiff.output.storage import Storage
from raydiff.output.video.clip_reader import open_clip

Box = tuple[int, int]

FRAME_GAP = 2
REDUCING_GAP = 3.0
"""Pillow first halves a large image cheaply, down to this many times the size asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A thumbnail, or why there is none."""

    image: Image.Image | None = None
    problem: str = ""
    """`failed`, `quarantined`, `missing` or `broken`."""
    message: str = ""


def make_picture(out: str | Path | Storage, row: Row, frame: Box, num_frames: int) -> Picture:
    """Return the picture of a metadata row; `frame` bounds an image, or each frame of a clip."""
    if row["status"] != "completed":
        return Picture(problem=row["status"], message=row["error"] or "")
    try:
        if is_clip(media_name(row)):
            with open_clip(out, row) as clip:
                return Picture(image=_strip(clip.spread(num_frames), frame))
        with open_media(out, row) as file:
            return Picture(image=fitted(read_image(file, max_size=frame), frame))
    except MediaError as error:
        problem = "missing" if error.is_missing else "broken"
        return Picture(problem=problem, message=f"{error} ({describe_media(row)})")


def fitted_size(size: Box, box: Box) -> Box:
    """Return the largest size of the same shape that fits a box."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))


def strip_size(frame: Box, num_frames: int) -> Box:
    """Return the size of frames side by side."""
    return (num_frames * frame[0] + (num_frames - 1) * FRAME_GAP, frame[1])


def fitted(image: Image.Image, box: Box) -> Image.Image:
    """Scale an image to fit a box."""
    size = fitted_size(image.size, box)
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)


def _strip(frames: list[Pixels], frame: Box) -> Image.Image:
    """Return frames of a clip side by side."""
    pictures = [fitted(Image.fromarray(pixels), frame) for pixels in frames]
    width, height = pictures[0].size
    strip = Image.new("RGB", strip_size((width, height), len(pictures)), "white")
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * (width + FRAME_GAP), 0))
    return strip
