"""Does a clip show and sound as its caption says? Plain analysis of its frames and samples."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raydiff.mini.ltx2.draw import TONES
from raydiff.mini.ltx2.scenes import CANVAS, STEPS, ClipScene, Direction
from raydiff.mini.measure import Found, background_name, find_objects
from raydiff.mini.scenes import Shape
from raydiff.output.video.audio import Audio

LOOK_EVERY = 4
"""Frames from one that is looked at to the next."""
ENLARGE = 2
"""To the size of the other miniatures' pictures, for which the analysis was made."""
MIN_WAY = 8.0
"""Pixels that a shape's middle moves in a clip, or it stands still."""
MIN_LOUDNESS = 0.02
"""Root mean square of the samples of a sound that is heard."""
MAX_DETUNE = 25.0
"""Hertz that the loudest frequency may be off a tone."""
WINDOW_S = 0.125
"""Seconds of sound that tell where it comes from: a frame's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipScore:
    """Whether a clip has what a scene asks for."""

    color: bool
    """Every frame shows one object, of the colour asked for."""
    shape: bool
    """Most frames show the shape."""
    direction: bool
    """It moves as asked, from the first frame to the last."""
    background: bool
    tone: bool
    """The loudest frequency is the shape's, nearer than to any other's."""
    pan: bool | None
    """The sound moves with a shape that moves left or right; None of other clips."""

    @property
    def is_right(self) -> bool:
        """Whether nothing of it is wrong."""
        return (
            self.color
            and self.shape
            and self.direction
            and self.background
            and self.tone
            and self.pan is not False
        )


class Heard(NamedTuple):
    """What a sound tells."""

    shape: Shape | None
    """None of silence, and of a frequency that is no shape's."""
    places: NDArray[np.float64]
    """Where it comes from, frame by frame, in pixels from the left."""


def score_clip(scene: ClipScene, frames: NDArray[np.uint8], audio: Audio | None) -> ClipScore:
    """Compare a clip's frames (F, H, W, 3) and sound with a scene."""
    looked = [*range(0, len(frames), LOOK_EVERY)]
    found = [_look(frames[index]) for index in looked]
    singles = [objects[0] for objects in found if len(objects) == 1]
    heard = None if audio is None else listen(audio, len(frames))
    shapes = Counter(one.shape for one in singles)
    grounds = Counter(background_name(frames[index]) for index in looked)
    return ClipScore(
        color=len(singles) == len(looked) and {one.color for one in singles} == {scene.color},
        shape=bool(shapes) and shapes[scene.shape] > len(looked) / 2,
        direction=_direction(found) == scene.direction,
        background=grounds.most_common(1)[0][0] == scene.background,
        tone=heard is not None and heard.shape == scene.shape,
        pan=_pan(scene, heard),
    )


def listen(audio: Audio, num_frames: int) -> Heard:
    """Tell a clip's shape by its tone, and where it is by how loud left and right are."""
    samples = audio.samples.astype(np.float64)
    size = round(WINDOW_S * audio.sample_rate)
    parts = samples[:, : num_frames * size]
    parts = np.pad(parts, ((0, 0), (0, num_frames * size - parts.shape[1])))
    left, right = np.sqrt(np.square(parts.reshape(2, num_frames, size)).mean(axis=-1))
    places = np.arctan2(right, left) / (np.pi / 2) * CANVAS
    return Heard(_tone_of(samples.mean(axis=0), audio.sample_rate), places)


def _look(frame: NDArray[np.uint8]) -> list[Found]:
    """Find a frame's objects; their places are in pixels of the frame."""
    size = (frame.shape[1] * ENLARGE, frame.shape[0] * ENLARGE)
    larger = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
    return find_objects(larger)


def _direction(found: list[list[Found]]) -> Direction | None:
    """Where the one object goes; None where the first or the last frame has not just one."""
    if len(found[0]) != 1 or len(found[-1]) != 1:
        return None
    first, last = found[0][0], found[-1][0]
    right, down = ((last.x - first.x) / ENLARGE, (last.y - first.y) / ENLARGE)
    if max(abs(right), abs(down)) < MIN_WAY:
        return "still"
    step = (int(np.sign(right)), 0) if abs(right) > abs(down) else (0, int(np.sign(down)))
    return next(name for name, known in STEPS.items() if known == step)


def _tone_of(samples: NDArray[np.float64], sample_rate: int) -> Shape | None:
    if np.sqrt(np.square(samples).mean()) < MIN_LOUDNESS:
        return None
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    hertz = float(spectrum.argmax() * sample_rate / len(samples))
    nearest = min(TONES, key=lambda shape: abs(TONES[shape] - hertz))
    return nearest if abs(TONES[nearest] - hertz) < MAX_DETUNE else None


def _pan(scene: ClipScene, heard: Heard | None) -> bool | None:
    right = STEPS[scene.direction][0]
    if not right:
        return None
    if heard is None:
        return False
    # The first frame and the last are faded.
    way = heard.places[-3:-1].mean() - heard.places[1:3].mean()
    return bool(abs(way) > MIN_WAY / 2 and np.sign(way) == right)
