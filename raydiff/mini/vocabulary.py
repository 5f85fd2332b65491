"""Every word that captions use: each is one token of the miniatures' tokenizers."""

from raydiff.mini.captions import (
    BACKGROUND_WORDS,
    NUMBERS,
    OPENINGS,
    RELATION_WORDS,
    SIZE_WORDS,
)
from raydiff.mini.scenes import BACKGROUNDS, COLORS, SHAPES


def words() -> list[str]:
    """Return the words of captions, sorted; shapes in both numbers."""
    shapes = [*SHAPES, "shape"]
    texts = [
        *OPENINGS,
        *BACKGROUND_WORDS,
        *(word for choices in NUMBERS.values() for word in choices),
        *(word for choices in SIZE_WORDS.values() for word in choices),
        *(word for choices in RELATION_WORDS.values() for word in choices),
        *COLORS,
        *BACKGROUNDS,
        *shapes,
        *(f"{shape}s" for shape in shapes),
        "and",
        "an",
    ]
    found = {word for text in texts for word in text.replace("{}", "").replace(",", "").split()}
    return sorted(word for word in found if len(word) > 1)
