"""Contact sheets: a run's pictures side by side, labelled by its metadata, page by page.

One page and its thumbnails are in memory at a time, and one full picture for each thread.
"""

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image, ImageDraw

from raydiff.errors import ConfigError
from raydiff.output.media_files import is_clip
from raydiff.output.sheet.grid import COMPARED_COLUMNS, Cell, Row, SheetGrid, label
from raydiff.output.sheet.lettering import Colour, Lettering, Paragraph
from raydiff.output.sheet.pictures import Box, Picture, fitted_size, make_picture, strip_size
from raydiff.output.storage import Storage, open_storage

PAGE_SIZE = 3200
"""Pixels of a page's longer side, unless a single cell is larger."""
MAX_PAGES = 500
LIST_ASPECT = 1.4
"""Width to height of a page without axes that could be narrower."""
HEADING_LINES = 8
MIN_PAGE_WIDTH = 32
MAX_LABEL_WIDTH = 14
"""In letter heights."""
MAX_LABEL_LINES = 4

WHITE = (255, 255, 255)
INK = (24, 24, 27)
GREY = (113, 113, 122)
RED = (153, 27, 27)
PALE = (245, 245, 246)
PALE_RED = (253, 240, 240)
DARK = (39, 39, 42)


@dataclass(frozen=True, kw_only=True, slots=True)
class PageCells:
    """The part of a grid that one page shows."""

    xs: range
    ys: range
    z: int


class Sheet:
    """Iterate it once for its pages; `problems` then counts the cells without a picture."""

    def __init__(
        self,
        out: str | Path | Storage,
        grid: SheetGrid,
        *,
        cell_size: int = 256,
        num_frames: int = 4,
        num_threads: int = 4,
    ) -> None:
        """Lay the pages out. `cell_size` is the longer side of an image, or of a clip's frame.

        Raises ConfigError if there would be more than MAX_PAGES pages.
        """
        self._out = open_storage(out)
        self._grid = grid
        self._num_frames = num_frames
        self._num_threads = num_threads
        self._frame, self._box = _boxes(grid, cell_size, num_frames)
        self.missing_characters: set[str] = set()
        """What no font here has, and is drawn as an empty box."""
        size = min(max(round(cell_size * 0.07), 13), 24)
        small = max(round(size * 0.8), 12)
        self._title = self._lettering(round(size * 1.5), INK)
        self._text = self._lettering(size, INK)
        self._caption = self._lettering(small, INK)
        self._note = self._lettering(small, GREY)
        self._error = self._lettering(small, RED)
        self._badge = self._lettering(small, WHITE)
        self._gap = max(cell_size // 32, 6)
        self._margin = 2 * size
        self._min_width = MIN_PAGE_WIDTH * size
        self._constants = grid.constants()
        self._max_caption_lines = self._count_caption_lines()
        self._label_width = self._measure_row_labels()
        self._pages = self._divide()
        self.problems: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Image.Image]:
        with ThreadPoolExecutor(self._num_threads) as pool:
            try:
                for number, page in enumerate(self._pages, start=1):
                    yield self._paint(page, number, pool)
            finally:
                pool.shutdown(cancel_futures=True)

    def _step(self, caption_height: int) -> Box:
        """Return the way from one cell to the next, to the right and down."""
        space = self._note.line_height if caption_height else 0
        return (self._box[0] + self._gap, self._box[1] + caption_height + space + self._gap)

    def _lettering(self, size: int, colour: Colour) -> Lettering:
        return Lettering(size=size, colour=colour, missing=self.missing_characters)

    def _count_caption_lines(self) -> int:
        if not self._grid.is_list:
            return 0
        return 2 if "prompt" in self._constants else 4

    def _measure_row_labels(self) -> int:
        if self._grid.y is None:
            return 0
        widest = max(self._text.width(text[:100]) for text in self._grid.y.labels)
        name = self._note.width(self._grid.y.name)
        return max(min(widest, MAX_LABEL_WIDTH * self._text.size), name) + 2 * self._gap

    def _divide(self) -> list[PageCells]:
        """Share the cells out over pages of like size."""
        width, height = self._step(self._max_caption_lines * self._note.line_height)
        nx, ny, nz = self._grid.shape
        head = HEADING_LINES * self._text.line_height
        most_x = max((PAGE_SIZE - 2 * self._margin - self._label_width) // width, 1)
        most_y = max((PAGE_SIZE - 2 * self._margin - head) // height, 1)
        if self._grid.is_list:
            self._columns = min(most_x, math.ceil(math.sqrt(nx * LIST_ASPECT * height / width)))
            x_shares, y_shares = _shares(nx, self._columns * most_y), [range(1)]
        else:
            x_shares, y_shares = _even_shares(nx, most_x), _even_shares(ny, most_y)
            self._columns = most_x
        num_pages = nz * len(x_shares) * len(y_shares)
        if num_pages > MAX_PAGES:
            raise ConfigError(
                f"the sheet would have {num_pages:,} pages; {MAX_PAGES} is the most "
                f"({self._grid.num_filled:,} of {nx * ny * nz:,} cells have a result). "
                "Choose axes with fewer values, a smaller --cell, or --limit."
            )
        return [PageCells(xs=x, ys=y, z=z) for z in range(nz) for y in y_shares for x in x_shares]

    def _paint(self, page: PageCells, number: int, pool: ThreadPoolExecutor) -> Image.Image:
        cells = [self._grid.cell(x, y, page.z) for y in page.ys for x in page.xs]
        captions = [self._caption_of(cell) for cell in cells]
        step = self._step(max(sum(one.height for one in caption) for caption in captions))
        columns = min(len(page.xs), self._columns)
        left = self._margin + self._label_width
        width = max(left + columns * step[0] - self._gap + self._margin, self._min_width)
        heading = self._heading(page, number, width - 2 * self._margin)
        labels = self._column_labels(page)
        middle = self._margin + sum(one.height for one in heading) + self._text.size
        top = middle + max((one.height for one in labels), default=0) + self._axis_names_height()
        height = top + math.ceil(len(cells) / columns) * step[1] - self._gap + self._margin
        canvas = Image.new("RGB", (width, height), WHITE)
        draw = ImageDraw.Draw(canvas)
        _draw_column(draw, (self._margin, self._margin), heading)
        self._draw_axis_names(draw, (left, middle))
        for column, paragraph in enumerate(labels):
            place = (left + column * step[0], top - self._gap - paragraph.height)
            _draw_column(draw, place, [paragraph])
        for row, paragraph in enumerate(self._row_labels(page)):
            _draw_column(draw, (self._margin, top + row * step[1]), [paragraph])
        for index, picture in enumerate(pool.map(self._picture, cells)):
            row, column = divmod(index, columns)
            place = (left + column * step[0], top + row * step[1])
            self._paint_cell(canvas, draw, place, cells[index], picture)
            caption_top = place[1] + self._box[1] + self._note.size // 3
            _draw_column(draw, (place[0], caption_top), captions[index])
        return canvas

    def _heading(self, page: PageCells, number: int, width: int) -> list[Paragraph]:
        """Return title, page and what all pictures of the sheet share."""
        folder = self._out.local_path("")
        title = folder.resolve().name if folder is not None else PurePath(self._out.uri).name
        if len(self._pages) > 1:
            title += f", page {number} of {len(self._pages)}"
        found = [self._title.wrap(title, width, 1)]
        if self._grid.z is not None:
            text = f"{self._grid.z.name}: {self._grid.z.labels[page.z]}"
            found.append(self._text.wrap(text, width, 2))
        if self._constants.get("prompt"):
            found.append(self._text.wrap(str(self._constants["prompt"]), width, 2))
        settings = {name: one for name, one in self._constants.items() if name != "prompt"}
        if settings:
            found.append(self._note.wrap(describe(settings), width, 2))
        return found

    def _column_labels(self, page: PageCells) -> list[Paragraph]:
        if self._grid.x is None:
            return []
        labels = self._grid.x.labels
        return [self._text.wrap(labels[x], self._box[0], MAX_LABEL_LINES) for x in page.xs]

    def _axis_names_height(self) -> int:
        has_names = self._grid.x is not None or self._grid.y is not None
        return self._gap + (self._note.line_height if has_names else 0)

    def _draw_axis_names(self, draw: ImageDraw.ImageDraw, place: Box) -> None:
        if self._grid.x is not None:
            self._note.wrap(self._grid.x.name, self._min_width, 1).draw(draw, place)
        if self._grid.y is not None:
            name = self._note.wrap(self._grid.y.name, self._label_width, 1)
            name.draw(draw, (self._margin, place[1]))

    def _row_labels(self, page: PageCells) -> list[Paragraph]:
        if self._grid.y is None:
            return []
        labels = self._grid.y.labels
        width = self._label_width - 2 * self._gap
        num_lines = max(self._box[1] // self._text.line_height, 1)
        return [self._text.wrap(labels[y], width, num_lines) for y in page.ys]

    def _caption_of(self, cell: Cell | None) -> list[Paragraph]:
        """Return the prompt, unless it is in the heading, and what sets this picture apart."""
        if cell is None or not self._grid.is_list:
            return []
        row, width = cell.row, self._box[0]
        own = {
            name: row[name]
            for name in COMPARED_COLUMNS
            if row[name] is not None and name not in self._constants and name != "prompt"
        }
        text = f"row {row['row_index']}" + (f": {describe(own)}" if own else "")
        prompt = "" if "prompt" in self._constants else row["prompt"] or ""
        caption = self._caption.wrap(prompt, width, self._max_caption_lines - 2)
        num_left = self._max_caption_lines - len(caption.lines)
        return [caption, self._note.wrap(text, width, num_left)]

    def _picture(self, cell: Cell | None) -> Picture:
        if cell is None:
            return Picture(problem="empty")
        return make_picture(self._out, cell.row, self._frame, self._num_frames)

    def _paint_cell(
        self,
        canvas: Image.Image,
        draw: ImageDraw.ImageDraw,
        place: Box,
        cell: Cell | None,
        picture: Picture,
    ) -> None:
        (left, top), (width, height) = place, self._box
        if picture.image is not None:
            inset = ((width - picture.image.width) // 2, (height - picture.image.height) // 2)
            canvas.paste(picture.image, (left + inset[0], top + inset[1]))
        else:
            self.problems[picture.problem] += 1
            fill = PALE if cell is None else PALE_RED
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=fill)
        if cell is None:
            return
        if picture.problem:
            self._draw_problem(draw, place, picture)
        if cell.num_results > 1:
            self._draw_badge(draw, place, f"1 of {cell.num_results:,}")

    def _draw_problem(self, draw: ImageDraw.ImageDraw, place: Box, picture: Picture) -> None:
        inset = self._error.size // 2
        width, height = (size - 2 * inset for size in self._box)
        text = f"{picture.problem}: {picture.message}" if picture.message else picture.problem
        paragraph = self._error.wrap(text, width, max(height // self._error.line_height, 1))
        paragraph.draw(draw, (place[0] + inset, place[1] + inset))

    def _draw_badge(self, draw: ImageDraw.ImageDraw, place: Box, text: str) -> None:
        size = self._badge.size
        width, height = self._badge.width(text) + size * 2 // 3, round(size * 1.6)
        left = place[0] + self._box[0] - width - size // 3
        top = place[1] + self._box[1] - height - size // 3
        box = (left, top, left + width, top + height)
        draw.rounded_rectangle(box, radius=size // 2, fill=DARK)
        inside = (left + size // 2, top + round(size * 0.2))
        self._badge.wrap(text, width, 1).draw(draw, inside)


def describe(settings: Row) -> str:
    """Return settings of a request in one line: `sdxl, 1024x1024, 30 steps, guidance 7.5`."""
    values = dict(settings)
    parts = []
    if "model" in values:
        parts.append(PurePath(values.pop("model")).name)
    if "width" in values and "height" in values:
        parts.append(f"{values.pop('width')}x{values.pop('height')}")
    if "num_frames" in values and "frame_rate" in values:
        frames, rate = values.pop("num_frames"), values.pop("frame_rate")
        parts.append(f"{frames} frames at {label(rate)} fps")
    if "num_inference_steps" in values:
        parts.append(f"{values.pop('num_inference_steps')} steps")
    if "guidance_scale" in values:
        parts.append(f"guidance {label(values.pop('guidance_scale'))}")
    if "sampler" in values:
        parts.append(values.pop("sampler"))
    if values.get("task") in ("txt2img", "txt2vid"):
        del values["task"]
    if not values.get("guidance_rescale"):
        values.pop("guidance_rescale", None)
    for name, value in values.items():
        if value != "":
            parts.append(f"{name.replace('_', ' ')} {label(value)}")
    return ", ".join(parts)


def _boxes(grid: SheetGrid, cell_size: int, num_frames: int) -> tuple[Box, Box]:
    """Return the box of an image or frame and that of a cell: no larger than the pictures need."""
    square = (cell_size, cell_size)
    frames, cells = [], []
    for width, height, ending in grid.picture_shapes():
        frame = fitted_size((width, height), square)
        frames.append(frame)
        cells.append(strip_size(frame, num_frames) if is_clip(ending) else frame)
    return _around(frames or [square]), _around(cells or [square])


def _around(boxes: list[Box]) -> Box:
    return (max(width for width, _ in boxes), max(height for _, height in boxes))


def _shares(num: int, most: int) -> list[range]:
    return [range(start, min(start + most, num)) for start in range(0, num, most)]


def _even_shares(num: int, most: int) -> list[range]:
    """Divide into as few shares as can be, none much smaller than the others."""
    return _shares(num, math.ceil(num / math.ceil(num / most)))


def _draw_column(draw: ImageDraw.ImageDraw, place: Box, paragraphs: list[Paragraph]) -> None:
    left, top = place
    for paragraph in paragraphs:
        paragraph.draw(draw, (left, top))
        top += paragraph.height
