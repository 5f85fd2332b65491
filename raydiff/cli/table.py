"""Rows as a table on a terminal: aligned, clipped to its width, nothing in a value obeyed."""

import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.cells import cell_len, set_cell_size

from raydiff.output.rows_file import plain

GAP = 2
MIN_COLUMN_WIDTH = 8
"""Where columns would be narrower than this, each row becomes a block of lines."""
MAX_CHARACTERS = 1000
"""Of one value; the width of the terminal cuts it before that."""
FORMAT_CHARACTERS = {*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}
"""Zero-width and text-direction characters: they would rearrange the line around a value."""


def print_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their column names, as wide as the terminal."""
    for line in table_lines(names, rows):
        click.echo(line)


def table_lines(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yield the lines of a table that is as wide as the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    header = [printable(name) for name in names]
    cells = [[printable(value) for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(header, *cells, strict=True)]
    space = width - GAP * (len(names) - 1)
    if sum(min(one, MIN_COLUMN_WIDTH) for one in widths) > space:
        yield from _blocks(header, cells, width)
        return
    widths = _narrowed(widths, space)
    is_number = [any(_is_number(row[index]) for row in rows) for index in range(len(names))]
    for row in [header, *cells]:
        columns = zip(row, widths, is_number, strict=True)
        yield (" " * GAP).join(_fitted(*column) for column in columns).rstrip()


def printable(value: Any) -> str:
    """Return a value as one line that a terminal shows as it is and obeys none of."""
    if isinstance(value, float):
        return f"{value:.6g}"
    value = plain(value)
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(map(_visible, text[:MAX_CHARACTERS]))


def clipped(text: str, width: int) -> str:
    """Cut a text to a width in terminal cells."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _visible(character: str) -> str:
    if character in "\r\n\t":
        return " "
    code = ord(character)
    if code < 0x20 or 0x7F <= code < 0xA0:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code in FORMAT_CHARACTERS else character


def _narrowed(widths: Sequence[int], space: int) -> list[int]:
    """Narrow the widest columns alone until all fit."""
    limit = max(widths, default=0)
    while sum(min(width, limit) for width in widths) > space and limit > MIN_COLUMN_WIDTH:
        limit -= 1
    return [min(width, limit) for width in widths]


def _fitted(text: str, width: int, is_number: bool) -> str:
    text = clipped(text, width)
    padding = " " * (width - cell_len(text))
    return padding + text if is_number else text + padding


def _blocks(header: list[str], cells: list[list[str]], width: int) -> Iterator[str]:
    name_width = max(map(cell_len, header))
    for number, row in enumerate(cells, start=1):
        yield f"row {number}"
        for name, text in zip(header, row, strict=True):
            space = max(width - name_width - 2 * GAP, MIN_COLUMN_WIDTH)
            fitted = _fitted(text, space, is_number=False).rstrip()
            yield f"  {set_cell_size(name, name_width)}  {fitted}".rstrip()


def _is_number(value: Any) -> bool:
    return isinstance(plain(value), int | float) and not isinstance(value, bool)
