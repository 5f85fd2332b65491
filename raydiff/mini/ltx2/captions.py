"""Captions of clips, in varied wording, and every word of them."""

import numpy as np

from raydiff.mini.captions import BACKGROUND_WORDS, SIZE_WORDS, UNNAMED_WHITE_SHARE, pick
from raydiff.mini.ltx2.scenes import ClipScene, Direction
from raydiff.mini.scenes import BACKGROUNDS, COLORS, SHAPES

OPENINGS = ("", "", "", "", "a video of ", "a clip of ", "an animation of ")
MOTION_WORDS: dict[Direction, tuple[str, ...]] = {
    "left": ("moving left", "moving to the left", "that moves left", "going left"),
    "right": ("moving right", "moving to the right", "that moves right", "going right"),
    "up": ("moving up", "rising", "that moves up", "going up"),
    "down": ("moving down", "sinking", "that moves down", "going down"),
    "still": ("standing still", "that does not move", "at rest"),
}


def clip_caption(scene: ClipScene, rng: np.random.Generator) -> str:
    """Describe a clip in one of many ways."""
    size = pick(SIZE_WORDS[scene.size], rng)
    text = " ".join(word for word in (size, scene.color, scene.shape) if word)
    article = "an" if text[0] in "aeiou" else pick(("a", "a", "one"), rng)
    motion = pick(MOTION_WORDS[scene.direction], rng)
    background = pick(BACKGROUND_WORDS, rng).format(scene.background)
    if scene.background == "white" and rng.random() < UNNAMED_WHITE_SHARE:
        background = ""
    return f"{pick(OPENINGS, rng)}{article} {text} {motion}{background}"


def clip_words() -> list[str]:
    """Return the words of captions, sorted."""
    texts = [
        *OPENINGS,
        *BACKGROUND_WORDS,
        *(word for choices in SIZE_WORDS.values() for word in choices),
        *(word for choices in MOTION_WORDS.values() for word in choices),
        *COLORS,
        *BACKGROUNDS,
        *SHAPES,
        "a",
        "an",
        "one",
    ]
    return sorted(
        {word for text in texts for word in text.replace("{}", "").replace(",", "").split()}
    )
