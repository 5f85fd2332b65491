"""Text on a picture: fonts that have the characters, lines that fit a width.

Pillow's own font has little more than ASCII; for the rest a font of the system is taken where
one is found. What no font has is drawn as that font's empty box.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache

from PIL import ImageDraw, ImageFont

SYSTEM_FONTS = (
    "DejaVuSans.ttf",  # Latin, Greek, Cyrillic, Arabic, Hebrew
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "Arial Unicode.ttf",  # macOS
    "segoeui.ttf",  # Windows
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
)
PROBE_SIZE = 16
MAX_CHARACTERS = 600
"""A text is cut to this before it is measured: more does not fit a page's label."""
LINE_HEIGHT = 1.3
WORD_SPACE = 0.33
UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
DIRECTION_OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]")

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Paragraph:
    """Lines of one lettering and font, ready to be drawn."""

    lettering: "Lettering"
    font_name: str | None
    lines: list[str]

    @property
    def height(self) -> int:
        """Pixels from its first line to what follows."""
        return len(self.lines) * self.lettering.line_height

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[int, int]) -> None:
        """Draw the lines with their left upper corner at `place`."""
        left, top = place
        size, missing = self.lettering.size, self.lettering.missing
        font = _load(self.font_name, size)
        for number, line in enumerate(self.lines):
            # From the baseline, which fonts of different heights share.
            x, baseline = left, top + number * self.lettering.line_height + round(size * 0.95)
            missing.update(one for one in line if not _has_glyph(self.font_name, one))
            for run, width in _runs(line, self.font_name, size):
                draw.text((x, baseline), run, fill=self.lettering.colour, font=font, anchor="ls")
                x += width


@dataclass(frozen=True, kw_only=True, slots=True)
class Lettering:
    """Text of one size and colour."""

    size: int
    colour: Colour
    missing: set[str] = field(default_factory=set)
    """Characters that were drawn as empty boxes; letterings may share it."""

    @property
    def line_height(self) -> int:
        """Pixels from one line to the next."""
        return round(self.size * LINE_HEIGHT)

    def width(self, text: str) -> int:
        """Return the width of a short text in one line, in pixels."""
        text = one_line(text)
        return _width(text, _font_name(text), self.size)

    def wrap(self, text: str, width: int, max_lines: int) -> Paragraph:
        """Break a text into lines of at most `width` pixels; what is left over becomes "..."."""
        rest = one_line(text)
        name = _font_name(rest)
        lines: list[str] = []
        while rest and len(lines) < max_lines:
            is_last = len(lines) == max_lines - 1
            cut = self._clip if is_last else self._first_line
            lines.append(cut(rest, name, width))
            rest = "" if is_last else rest[len(lines[-1]) :].lstrip()
        return Paragraph(lettering=self, font_name=name, lines=lines)

    def _first_line(self, text: str, name: str | None, width: int) -> str:
        """Return as many words of `text` as fit, or as many characters of its first word."""
        end = self._num_fitting(text, name, width)
        if end == len(text):
            return text
        space = text.rfind(" ", 0, end + 1)
        return text[:space] if space > 0 else text[: max(end, 1)]

    def _clip(self, text: str, name: str | None, width: int) -> str:
        if self._num_fitting(text, name, width) == len(text):
            return text
        end = self._num_fitting(text, name, width - _width("...", name, self.size))
        return text[:end].rstrip() + "..."

    def _num_fitting(self, text: str, name: str | None, width: int) -> int:
        """Return how many characters from the start of `text` fit."""
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            fits = _width(text[:middle], name, self.size) <= width
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def one_line(text: str) -> str:
    """Return a text without line ends, control characters and direction overrides, cut short."""
    text = UNPRINTABLE.sub(" ", DIRECTION_OVERRIDES.sub("", text[: 2 * MAX_CHARACTERS])).strip()
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS] + "..."
    return "".join(map(_drawable, unicodedata.normalize("NFC", text)))


@cache
def _drawable(character: str) -> str:
    """Return a character, or the letter under its accent where no font has both."""
    if any(_has_glyph(name, character) for name in _font_names(character)):
        return character
    base = unicodedata.normalize("NFKD", character)[0]
    return base if base.isascii() and base.isprintable() else character


def _font_name(text: str) -> str | None:
    """Return the first font that has all of `text`, else the one that lacks least of it."""
    best, fewest = None, len(text) + 1
    for name in _font_names(text):
        lacking = sum(not _has_glyph(name, character) for character in text)
        if lacking < fewest:
            best, fewest = name, lacking
        if not lacking:
            break
    return best


def _font_names(text: str) -> tuple[str | None, ...]:
    """Return the fonts to try: Pillow's own, and for more than ASCII the system's."""
    return (None,) if text.isascii() else (None, *_system_fonts())


def _width(text: str, name: str | None, size: int) -> int:
    return sum(width for _, width in _runs(text, name, size))


def _runs(text: str, name: str | None, size: int) -> list[tuple[str, int]]:
    """Return what is drawn at once, and how wide it is; Pillow's font has its words too close."""
    font = _load(name, size)
    if name is not None:
        return [(text, round(font.getlength(text)))]
    space = round(size * WORD_SPACE)
    return [(word, round(font.getlength(word)) + space) for word in text.split(" ")]


@cache
def _system_fonts() -> tuple[str, ...]:
    found = []
    for name in SYSTEM_FONTS:
        try:
            ImageFont.truetype(name, PROBE_SIZE)
        except OSError:
            continue
        found.append(name)
    return tuple(found)


@cache
def _load(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType; install a wheel of it")
    return font


@cache
def _has_glyph(name: str | None, character: str) -> bool:
    """Tell whether a font has a character: whether it draws it unlike one that no font has."""
    if character.isspace():
        return True
    return _shape(name, character) != _shape(name, "\uffff")


@cache
def _shape(name: str | None, character: str) -> tuple[tuple[int, int], bytes]:
    mask = _load(name, PROBE_SIZE).getmask(character)
    return mask.size, bytes(mask)
