"""Sweep axes: the values that one column takes, as the command line or a job file writes them."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raydiff.errors import ConfigError, RowError
from raydiff.manifest.schema import COLUMNS, check_value, quoted

AxisValue = bool | int | float | str | tuple[int, ...] | None
MAX_LISTED = 1_000_000
"""Values that an axis may list; a single range may have more, it is not held."""
NUM_SHOWN = 6

_TYPES = {
    "text": pa.string(),
    "whole number": pa.int64(),
    "number": pa.float64(),
    "whole numbers": pa.list_(pa.int64()),
}
_RANGE = re.compile(r"(\d+)-(\d+)(?::(\d+))?")
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,14})(?:\.\d{1,15})?(?:[eE][+-]?\d{1,2})?")
_ITEM = re.compile(r'\s*("(?:[^"]|"")*"|[^,"]*)\s*(?:,|$)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A column and its values: an Arrow array, or a range that is never laid out."""

    name: str
    values: Any

    @property
    def num_values(self) -> int:
        if isinstance(self.values, range):  # len() ends at 2^63 - 1, seeds do not
            return (self.values.stop - self.values.start - 1) // self.values.step + 1
        return len(self.values)

    @property
    def type(self) -> pa.DataType:
        return pa.int64() if isinstance(self.values, range) else self.values.type

    def take(self, indices: Any) -> pa.Array:
        """Return the values at these places (int64 numpy)."""
        if isinstance(self.values, range):
            return pa.array(self.values.start + self.values.step * indices, pa.int64())
        return self.values.take(pa.array(indices))

    def describe(self) -> str:
        """Return the values in few words: `3, 5, 7.5`, `0-9`, `red, green, ... 40 more`."""
        if isinstance(self.values, range):
            step = f":{self.values.step}" if self.values.step > 1 else ""
            return f"{self.values.start}-{self.values.stop - 1}{step}"
        shown = [_shown(value) for value in self.values[:NUM_SHOWN].to_pylist()]
        more = self.num_values - len(shown)
        return ", ".join(text[:40] for text in shown) + (f", ... {more} more" if more else "")

    def identity(self) -> Any:
        """Return what tells the axis from another one, as JSON takes it."""
        if isinstance(self.values, range):
            return [self.name, self.values.start, self.values.stop, self.values.step]
        return [self.name, str(self.type), self.values.to_pylist()]


def make_axis(name: str, given: AxisValue | Sequence[AxisValue]) -> Axis:
    """Return the axis of a column; a text is read as on the command line: `3,5,7.5`, `0-9`.

    Commas part values, double quotes hold text together (`29,"28,29"` are two lists of blocks),
    null is no value, and a column of whole numbers or of lists of them takes ranges `first-last`
    and `first-last:step`. Raises ConfigError for an empty axis, a value twice, and a value that
    breaks its column's rule.
    """
    column = COLUMNS.get(name)
    kind = column.kind if column else None
    if isinstance(given, str):
        values = [_typed(item, kind, is_quoted) for item, is_quoted in _split(name, given)]
    elif isinstance(given, Sequence):
        values = list(given)
    else:
        values = [given]
    if not values:
        raise ConfigError(f"axis {name} has no values. Give it some: {name}=VALUE,VALUE")
    if kind in ("whole number", "whole numbers"):
        ranges = [_range(name, value) if isinstance(value, str) else value for value in values]
        if len(ranges) == 1 and isinstance(ranges[0], range):
            _check_known(name, [ranges[0].start, ranges[0].stop - 1])
            return Axis(name=name, values=ranges[0])
        values = _laid_out(name, ranges)
    if any(isinstance(value, bool) for value in values):
        raise ConfigError(
            f"axis {name}: true and false are neither text nor numbers. Write them in quotes."
        )
    if kind != "whole numbers" and any(isinstance(value, list | tuple) for value in values):
        raise ConfigError(
            f"axis {name}: its values are not lists. Write them one beside the other."
        )
    values = _check_known(name, values) if kind else _common_kind(values)
    _check_distinct(name, values)
    try:
        return Axis(name=name, values=pa.array(values, _TYPES[kind or _kind(values)]))
    except UnicodeEncodeError:
        raise ConfigError(f"axis {name}: a value is not valid Unicode text") from None


def _shown(value: Any) -> str:
    """Return a value as the command line writes it; several numbers need their quotes there."""
    text = as_text(value, "null")
    return f'"{text}"' if isinstance(value, list) and len(value) != 1 else text


def as_text(value: Any, null: str = "") -> str:
    """Return a value as a template shows it: 7.0 is `7`, a list `28,29`."""
    if value is None:
        return null
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def _split(name: str, text: str) -> list[tuple[str, bool]]:
    """Split at commas into (text, whether it was quoted)."""
    text = text.strip()
    items: list[tuple[str, bool]] = []
    position = 0
    while position < len(text) or text.endswith(","):
        match = _ITEM.match(text, position)
        if match is None:
            raise ConfigError(
                f"axis {name}: {quoted(text[position:])} has an odd double quote. Put a value with "
                'quotes in quotes and double its own: "a ""b"" c"'
            )
        is_quoted = match[1].startswith('"')
        item = next(csv.reader([match[1]]))[0] if is_quoted else match[1].strip()
        if not item and not is_quoted:
            raise ConfigError(
                f"axis {name}: {quoted(text)} has an empty value. Take the extra comma out, or "
                'write null for no value and "" for empty text.'
            )
        items.append((item, is_quoted))
        position = match.end()
    return items


def _typed(item: str, kind: str | None, is_quoted: bool) -> AxisValue:
    if is_quoted:
        return item
    if item == "null":
        return None
    if kind == "text":
        return item
    if _WHOLE.fullmatch(item):
        return int(item)
    if _NUMBER.fullmatch(item):
        return float(item)
    return item


def _range(name: str, text: str) -> range | str | int:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        return int(text) if re.fullmatch(r"\s*\d{1,19}\s*", text) else text
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if last < first or step == 0:
        raise ConfigError(f"axis {name}: {text} is no range. Write first-last, e.g. 0-9 or 0-90:10")
    return range(first, last + 1, step)


def _laid_out(name: str, items: list[Any]) -> list[Any]:
    num_values = sum(item.stop - item.start if isinstance(item, range) else 1 for item in items)
    if num_values > MAX_LISTED:
        raise ConfigError(
            f"axis {name} lists {num_values:,} values in several parts; {MAX_LISTED:,} are "
            "allowed. Give a single range."
        )
    return [value for item in items for value in (item if isinstance(item, range) else (item,))]


def _check_known(name: str, values: list[Any]) -> list[Any]:
    """Return the values of a known column as its rule has them."""
    column = COLUMNS[name]
    checked: list[Any] = []
    for value in values:
        if value is None:
            checked.append(None)
            continue
        if column.kind == "text":
            value = as_text(value)
        elif isinstance(value, str) and column.kind != "whole numbers":
            raise ConfigError(f"axis {name}: {quoted(value)} is not a {column.kind}.")
        try:
            checked.append(check_value(name, value))
        except RowError as error:
            raise ConfigError(f"axis {name}: {error}") from None
    return checked


def _kind(values: list[Any]) -> str:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int} and all(abs(value) < 2**63 for value in values if value is not None):
        return "whole number"
    return "number" if kinds and kinds <= {int, float} else "text"


def _common_kind(values: list[Any]) -> list[Any]:
    """Return the values as text if one of them is; whole numbers beside fractions as fractions."""
    kind = _kind(values)
    cast: Any = {"text": as_text, "whole number": int, "number": float}[kind]
    return [None if value is None else cast(value) for value in values]


def _check_distinct(name: str, values: list[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ConfigError(
                f"axis {name}: {quoted(as_text(value, 'null'))} is there twice. Take one out."
            )
        seen.add(value)
