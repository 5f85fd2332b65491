"""Prompt templates: `a {colour} {cat|dog}, __style__` has a field, a choice and a wildcard. A
parsed one knows how many texts it gives, and gives any of them by its number or by chance."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from math import prod

from raydiff.errors import ConfigError
from raydiff.manifest.schema import MAX_TEXT_CHARACTERS, quoted

MAX_DEPTH = 32
"""Choices within choices and wildcards within wildcards."""
MAX_PICKS = 64
"""Choices and wildcards that one text may take; each becomes a column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A place that the row's own value fills: `{colour}`."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrase:
    """Text, fields and choices, one after another. A whole template is one."""

    parts: "tuple[str | Field | Choice, ...]"
    num_texts: int
    max_characters: int
    """Of its longest text, fields left out."""
    fields: Counter[str]
    """How often a text has each field, at most."""
    picks: Counter[str]
    """How often a text takes each named choice, at most."""
    depth: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of several phrases: `{a|b}`, or a line of a wildcard's file."""

    name: str | None
    """Column that keeps what was taken; None for a choice inside a wildcard's file."""
    options: tuple[Phrase, ...]
    ends: tuple[int, ...]
    """Running totals of the options' texts."""
    max_characters: int
    fields: Counter[str]
    picks: Counter[str]
    depth: int

    @property
    def num_texts(self) -> int:
        return self.ends[-1]


class Draws:
    """Numbers that depend on the seed and the row alone, the same on every machine."""

    def __init__(self, seed: int, row_index: int) -> None:
        self._key = f"{seed}/{row_index}"
        self._num_drawn = 0

    def below(self, limit: int) -> int:
        """Return the next number from 0 to limit - 1."""
        self._num_drawn += 1
        digest = blake2b(f"{self._key}/{self._num_drawn}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % limit


WildcardLookup = Callable[[str], Choice]

_TOKEN = re.compile(r"\\(?P<escaped>[{}|_\\])|(?P<mark>[{}|])|__(?P<wildcard>\w(?:[\w/.-]*?\w)?)__")


def parse_template(text: str, wildcard: WildcardLookup, *, is_named: bool = True) -> Phrase:
    r"""Parse a template; `\` takes the meaning from a `{`, `}`, `|` or `_` after it.

    `wildcard` returns a wildcard's choice by name. The choices of a named template are called
    choice_1, choice_2, ... in the order of their braces. Raises ConfigError.
    """
    parser = _Parser(text, wildcard, is_named)
    phrase = parser.parse(0)
    if phrase.max_characters > MAX_TEXT_CHARACTERS:
        raise ConfigError(
            f"template {quoted(text)}: its longest text has {phrase.max_characters:,} characters; "
            f"{MAX_TEXT_CHARACTERS:,} are allowed. Shorten its wildcards."
        )
    if phrase.picks.total() > MAX_PICKS:
        raise ConfigError(
            f"template {quoted(text)}: one text takes {phrase.picks.total():,} choices and "
            f"wildcards; {MAX_PICKS} are allowed. Use fewer, or nest them less."
        )
    return phrase


def fill(
    phrase: Phrase,
    values: Mapping[str, str],
    picks: list[tuple[str, str]],
    *,
    number: int = 0,
    draws: Draws | None = None,
) -> str:
    """Return the phrase's text of that number (or, with `draws`, one by chance), fields filled.

    Texts are numbered so that the last choice changes first. Every named choice that is taken
    is added to `picks` as (name, text), in reading order.
    """
    numbers = []
    for part in reversed(phrase.parts):
        if isinstance(part, Choice):
            number, own = divmod(number, part.num_texts)
            numbers.append(own)
    texts = []
    for part in phrase.parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Field):
            texts.append(values[part.name])
        else:
            texts.append(_fill_choice(part, values, picks, numbers.pop(), draws))
    return "".join(texts)


def _fill_choice(
    choice: Choice,
    values: Mapping[str, str],
    picks: list[tuple[str, str]],
    number: int,
    draws: Draws | None,
) -> str:
    if draws is None:
        index = bisect_right(choice.ends, number)
        number -= choice.ends[index - 1] if index else 0
    else:
        index, number = draws.below(len(choice.options)), 0
    place = len(picks)
    if choice.name is not None:
        picks.append((choice.name, ""))
    text = fill(choice.options[index], values, picks, number=number, draws=draws)
    if choice.name is not None:
        picks[place] = (choice.name, text)
    return text


def make_choice(name: str | None, options: Iterable[Phrase]) -> Choice:
    """Return the choice between phrases, of which there must be at least one."""
    options = tuple(options)
    return Choice(
        name=name,
        options=options,
        ends=tuple(accumulate(option.num_texts for option in options)),
        max_characters=max(option.max_characters for option in options),
        fields=_most(option.fields for option in options),
        picks=Counter([name] if name else []) + _most(option.picks for option in options),
        depth=1 + max(option.depth for option in options),
    )


def _make_phrase(parts: list[str | Field | Choice]) -> Phrase:
    choices = [part for part in parts if isinstance(part, Choice)]
    return Phrase(
        parts=tuple(parts),
        num_texts=prod(choice.num_texts for choice in choices),
        max_characters=sum(len(part) for part in parts if isinstance(part, str))
        + sum(choice.max_characters for choice in choices),
        fields=sum(
            (choice.fields for choice in choices),
            Counter(part.name for part in parts if isinstance(part, Field)),
        ),
        picks=sum((choice.picks for choice in choices), Counter()),
        depth=max((choice.depth for choice in choices), default=0),
    )


def _most(counters: Iterable[Counter[str]]) -> Counter[str]:
    most: Counter[str] = Counter()
    for counter in counters:
        most |= counter
    return most


class _Parser:
    """Reads a template from left to right; a brace is a phrase in it."""

    def __init__(self, text: str, wildcard: WildcardLookup, is_named: bool) -> None:
        self._text = text
        self._wildcard = wildcard
        self._is_named = is_named
        self._position = 0
        self._num_braces = 0

    def parse(self, depth: int) -> Phrase:
        """Parse up to the end of the template or, inside a brace, up to its next | or }."""
        parts: list[str | Field | Choice] = []
        while match := _TOKEN.search(self._text, self._position):
            parts.append(self._text[self._position : match.start()])
            if match["mark"] in ("|", "}") and depth:
                self._position = match.start()
                return _stripped(parts)
            self._position = match.end()
            if match["escaped"]:
                parts.append(match["escaped"])
            elif match["wildcard"]:
                parts.append(self._wildcard(match["wildcard"]))
            elif match["mark"] == "{":
                parts.append(self._brace(match.start(), depth + 1))
            elif match["mark"] == "|":
                parts.append("|")
            else:
                raise self._error(match.start(), "closes a brace that is not open")
            self._check_depth(parts[-1])
        if depth:
            raise self._error(len(self._text), "a { is not closed")
        return _make_phrase([*parts, self._text[self._position :]])

    def _brace(self, start: int, depth: int) -> Field | Choice:
        if depth > MAX_DEPTH:
            raise self._error(start, f"braces are more than {MAX_DEPTH} deep")
        options = [self.parse(depth)]
        is_choice = self._text[self._position] == "|"
        if is_choice:
            self._num_braces += 1
        name = f"choice_{self._num_braces}" if is_choice and self._is_named else None
        while self._text[self._position] == "|":
            self._position += 1
            options.append(self.parse(depth))
        self._position += 1
        if is_choice:
            return make_choice(name, options)
        texts = [part for part in options[0].parts if isinstance(part, str)]
        if len(texts) < len(options[0].parts) or not "".join(texts):
            raise self._error(start, "a { needs a field's name, or choices with | between them")
        return Field(name="".join(texts))

    def _check_depth(self, part: str | Field | Choice) -> None:
        if isinstance(part, Choice) and part.depth > MAX_DEPTH:
            raise self._error(self._position, f"choices are more than {MAX_DEPTH} deep")

    def _error(self, position: int, problem: str) -> ConfigError:
        return ConfigError(
            f"template {quoted(self._text)}: character {position + 1}: {problem}. "
            r"Write \{ and \} for braces that are text."
        )


def _stripped(parts: list[str | Field | Choice]) -> Phrase:
    """Take the blanks around an option: `{ red | blue }` means `{red|blue}`."""
    parts = [part for part in parts if part != ""]
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return _make_phrase(parts)
