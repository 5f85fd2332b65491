"""A sweep: prompts times templates, settings and seeds, opened as a Manifest whose rows are made
when they are read. Memory does not grow with the number of rows."""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydiff.config import SweepConfig
from raydiff.errors import ConfigError, nearest
from raydiff.manifest.axes import Axis, as_text, make_axis
from raydiff.manifest.reader import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    AxisSummary,
    Manifest,
    prompts_manifest,
)
from raydiff.manifest.sampling import Sampling
from raydiff.manifest.schema import COLUMNS, check_schema, quoted
from raydiff.manifest.sources import no_prompt_error, open_source
from raydiff.manifest.template import Draws, Phrase, fill, parse_template
from raydiff.manifest.wildcards import Wildcards

TEMPLATE_COLUMN = "template"
SOURCE_PROMPT_COLUMN = "source_prompt"
RECIPE = 1
"""Part of every sweep's fingerprint; raised when the same settings would give other rows."""


def open_sweep(
    config: SweepConfig, *, source: str | None = None, prompts: Sequence[str] = ()
) -> Manifest:
    """Return the manifest of a sweep over a source's rows, over prompts, or over templates alone.

    Columns: prompt, one for each axis, the source's others, `template` and, where a template
    made the prompt of a source's, `source_prompt`, then one for each wildcard and choice. Raises
    ConfigError for axes, templates, wildcards and counts that cannot be, ManifestError for the
    source.
    """
    if source is not None and prompts:
        raise ConfigError("a source and prompts at once: give one or the other")
    axes = _axes(config)
    wildcards = Wildcards(config.wildcards)
    texts = _parse_templates(config, wildcards)
    if texts is None and source is None and not prompts:
        raise ConfigError(
            "sweep: there is nothing to sweep over. Name a file of prompts, a --prompt or a "
            "--template."
        )
    opened = open_source(source) if source is not None else None
    if prompts:
        opened = prompts_manifest(prompts)
    _check_names(config, axes, texts, opened)
    sampling = _sampling(config, axes, texts, opened)
    rows = SweepPart(
        source=opened,
        texts=texts,
        axes=axes,
        sampling=sampling,
        schema=_schema(axes, texts, opened),
    )
    uri = "sweep" if opened is None else f"sweep of {opened.uri}"
    check_schema(rows.schema, uri)
    return Manifest(
        uri=uri,
        folder=None if opened is None else opened.folder,
        schema=rows.schema,
        num_rows=sampling.num_rows,
        fingerprint=_fingerprint(config, axes, texts, wildcards, opened),
        parts=(rows,),
        axes=tuple(_summaries(axes, texts, opened)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The templates, as one axis: all their texts, or with `seed` one by chance in each row."""

    templates: tuple[str, ...]
    phrases: tuple[Phrase, ...]
    ends: tuple[int, ...]
    """Running totals of the places that the templates take on the axis."""
    seed: int | None
    fields: tuple[str, ...]
    picks: tuple[tuple[str, int], ...]
    """Named choices and how often a text takes them at most."""

    @property
    def pick_columns(self) -> list[str]:
        """A column for each time: `colour`, `colour_2`."""
        return [
            name if turn == 1 else f"{name}_{turn}"
            for name, most in self.picks
            for turn in range(1, most + 1)
        ]

    def fill(
        self, place: int, row_index: int, values: dict[str, str]
    ) -> tuple[str, str, dict[str, str]]:
        """Return the text at a place of the axis, its template and what it took, by column."""
        index = bisect_right(self.ends, place)
        number = place - (self.ends[index - 1] if index else 0)
        draws = None if self.seed is None else Draws(self.seed, row_index)
        taken: list[tuple[str, str]] = []
        text = fill(self.phrases[index], values, taken, number=number, draws=draws)
        turns: Counter[str] = Counter()
        columns = {}
        for name, pick in taken:
            turns[name] += 1
            columns[name if turns[name] == 1 else f"{name}_{turns[name]}"] = pick
        return text, self.templates[index], columns


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPart:
    """The rows of a sweep: the source's rows change slowest, then texts, then the axes in turn."""

    source: Manifest | None
    texts: Texts | None
    axes: tuple[Axis, ...]
    sampling: Sampling
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return self.sampling.num_rows

    def batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows from `start_row` on, in batches that are bounded in rows and bytes."""
        rows_each = self._rows_each_source_row()
        for first, window in self._windows(start_row // rows_each):
            start = max(start_row, first * rows_each)
            stop = min(self.num_rows, (first + window.num_rows) * rows_each)
            step = self._batch_rows(window)
            for row in range(start, stop, step):
                yield self._expand(row, min(row + step, stop), first, window)

    def _rows_each_source_row(self) -> int:
        """Return how many rows stand between one source row and the next; all where they mix."""
        lengths = self.sampling.lengths
        if self.source is None or self.sampling.mode == "random":
            return self.num_rows
        if self.sampling.mode == "zip":
            return self.num_rows if lengths[0] == 1 else 1
        return prod(lengths[1:])

    def _windows(self, first: int) -> Iterator[tuple[int, Any]]:
        """Yield (index of its first row, rows) of the source; a sample needs them all at hand."""
        if self.source is None:
            yield 0, pa.table({"": pa.nulls(1)}).select([])
        elif self.sampling.mode == "random":
            batches = [batch for _, batch in self.source.batches()]
            yield 0, pa.Table.from_batches(batches, schema=self.source.schema).combine_chunks()
        else:
            yield from self.source.batches(first)

    def _batch_rows(self, window: Any) -> int:
        """Return how many rows keep a batch within MAX_BATCH_BYTES, whatever rows they are."""
        widest = sum(
            pc.max(pc.binary_length(column)).as_py() or 0
            for column in window.columns
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        )
        if self.texts is not None:
            phrases = self.texts.phrases
            widest *= 1 + max(phrase.fields.total() for phrase in phrases)
            widest += 8 * max(phrase.max_characters for phrase in phrases)
        return max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES // (widest + 1)))

    def _expand(self, start: int, stop: int, first: int, window: Any) -> pa.RecordBatch:
        """Return the rows from `start` to `stop`, whose source rows lie in `window`."""
        places = self.sampling.places(start, stop)
        columns: dict[str, Any] = {}
        if self.source is not None:
            rows = window.take(pa.array(places.pop(0) - first))
            columns = {name: rows.column(name) for name in rows.schema.names}
        text_places = None if self.texts is None else places.pop(0)
        for axis, place in zip(self.axes, places, strict=True):
            columns[axis.name] = axis.take(place)
        if self.texts is not None:
            columns |= self._prompts(self.texts, start, text_places, columns)
        arrays = [_as_array(columns[field.name], field.type) for field in self.schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _prompts(
        self, texts: Texts, start: int, places: Any, columns: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the columns that templates make. Rows that differ in nothing a template sees
        share one text."""
        fields = [[as_text(value) for value in columns[n].to_pylist()] for n in texts.fields]
        rows: Sequence[int] = range(start, start + len(places))
        if texts.seed is None:  # then the row's index changes nothing
            rows = [0] * len(rows)
        seen = zip(places.tolist(), rows, *fields, strict=True)
        positions: dict[tuple[Any, ...], int] = {}
        inverse = pa.array([positions.setdefault(key, len(positions)) for key in seen], pa.int64())
        filled = [
            texts.fill(place, row, dict(zip(texts.fields, values, strict=True)))
            for place, row, *values in positions
        ]
        made: dict[str, list[str | None]] = {
            "prompt": [text for text, _, _ in filled],
            TEMPLATE_COLUMN: [template for _, template, _ in filled],
        }
        for name in texts.pick_columns:
            made[name] = [taken.get(name) for _, _, taken in filled]
        found = {name: pa.array(values, pa.string()).take(inverse) for name, values in made.items()}
        if "prompt" in columns:
            found[SOURCE_PROMPT_COLUMN] = columns["prompt"]
        if "prompt" in texts.fields:  # a row without its prompt stays one, for `plan` to find
            has_prompt = _as_array(columns["prompt"].is_valid(), pa.bool_())
            found["prompt"] = pc.if_else(has_prompt, found["prompt"], None)
        return found


def _as_array(column: Any, dtype: pa.DataType) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column if column.type == dtype else column.cast(dtype)


# -- what the settings say -------------------------------------------------------------------------


def _axes(config: SweepConfig) -> tuple[Axis, ...]:
    axes = [make_axis(name, values) for name, values in config.grid.items()]
    if config.seeds is not None:
        if "seed" in config.grid:
            raise ConfigError("axis seed is there twice, in seeds and in grid. Take one out.")
        axes.append(make_axis("seed", config.seeds))
    for axis in axes:
        if axis.name == "prompt":
            raise ConfigError(
                'axis prompt: prompts are not a grid axis. Give them as --prompt "text" or a file.'
            )
    return tuple(axes)


def _parse_templates(config: SweepConfig, wildcards: Wildcards) -> Texts | None:
    given = config.template
    templates = (given,) if isinstance(given, str) else given
    if config.wildcards is not None and not templates:
        raise ConfigError(
            "wildcards: there is no template to use them. Write __NAME__ in a --template; prompts "
            "are taken as they are."
        )
    if not templates:
        return None
    doubled = [text for text, count in Counter(templates).items() if count > 1]
    if doubled:
        raise ConfigError(f"template {quoted(doubled[0])} is there twice. Take one out.")
    phrases = tuple(parse_template(text, wildcards.choice) for text in templates)
    if config.wildcards is not None and not wildcards.num_read:
        raise ConfigError(
            f"wildcards: no template uses one of {config.wildcards}. Write __NAME__ for NAME.txt, "
            "or leave the folder out."
        )
    is_random = config.choices == "random"
    picks: Counter[str] = Counter()
    for phrase in phrases:
        picks |= phrase.picks
    return Texts(
        templates=templates,
        phrases=phrases,
        ends=tuple(accumulate(1 if is_random else phrase.num_texts for phrase in phrases)),
        seed=config.random_seed if is_random else None,
        fields=tuple(dict.fromkeys(name for phrase in phrases for name in phrase.fields)),
        picks=tuple(picks.items()),
    )


def _check_names(
    config: SweepConfig, axes: Sequence[Axis], texts: Texts | None, source: Manifest | None
) -> None:
    """Raise ConfigError for a field without values, an axis of nothing, two columns of a name."""
    axis_names = [axis.name for axis in axes]
    source_names: list[str] = [] if source is None else source.schema.names
    fields = () if texts is None else texts.fields
    known = [*axis_names, *source_names]
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"template: nothing fills the field {{{name}}}; {nearest(name, known)}"
                f"known: {', '.join(known) or 'none'}. Give it values: --grid {name}=VALUE,VALUE"
            )
    for name in axis_names:
        if name not in COLUMNS and name not in fields:
            candidates = [column for column in (*COLUMNS, *fields) if column != "prompt"]
            raise ConfigError(
                f"axis {name}: no such column, and no template has the field {{{name}}}; "
                f"{nearest(name, candidates)}known: {', '.join(candidates)}"
            )
    if texts is None:
        if source is not None and "prompt" not in source_names:
            raise no_prompt_error(source)
        return
    added = [TEMPLATE_COLUMN, *texts.pick_columns]
    if "prompt" in source_names:
        added.append(SOURCE_PROMPT_COLUMN)
    for name in added:
        if name in COLUMNS or name in known or added.count(name) > 1:
            raise ConfigError(
                f"sweep: two things would be the column {quoted(name)}: the one that the template "
                "makes, and another of that name. Rename the wildcard, axis or source column."
            )


def _sampling(
    config: SweepConfig, axes: Sequence[Axis], texts: Texts | None, source: Manifest | None
) -> Sampling:
    lengths = {} if source is None else {"prompts": source.num_rows}
    if texts is not None:
        lengths["texts of the template"] = texts.ends[-1]
    lengths |= {axis.name: axis.num_values for axis in axes}
    num_rows = _num_rows(config, lengths)
    if num_rows > config.max_rows:
        counts = " x ".join(f"{count:,} {name}" for name, count in lengths.items())
        joint = "side by side " if config.mode == "zip" else ""
        raise ConfigError(
            f"sweep: {num_rows:,} rows ({joint}{counts}); {config.max_rows:,} are allowed. Take "
            "values out, take a sample (--mode random --samples N), or raise the limit: "
            f"--max-rows {num_rows}"
        )
    return Sampling(
        mode=config.mode,
        lengths=tuple(lengths.values()),
        num_rows=num_rows,
        seed=config.random_seed,
    )


def _num_rows(config: SweepConfig, lengths: dict[str, int]) -> int:
    if config.mode == "random":
        if config.samples is None:
            raise ConfigError("mode random: how many rows? Say --samples N.")
        return config.samples
    if config.samples is not None:
        raise ConfigError(f"samples: {config.samples}: only mode random takes them: --mode random")
    if config.mode == "cartesian":
        return prod(lengths.values())
    longest = max(lengths.values())
    if any(length not in (1, longest) for length in lengths.values()):
        listed = ", ".join(f"{name} has {length:,}" for name, length in lengths.items())
        raise ConfigError(
            f"mode zip: axes differ in length: {listed}. Give each the same number of values, "
            "or one."
        )
    return longest


def _schema(axes: Sequence[Axis], texts: Texts | None, source: Manifest | None) -> pa.Schema:
    fields = {"prompt": pa.string()}
    fields |= {axis.name: axis.type for axis in axes}
    of_source = [] if source is None else list(source.schema)
    for field in of_source:
        if field.name == "prompt":
            fields["prompt" if texts is None else SOURCE_PROMPT_COLUMN] = field.type
        elif field.name not in fields:
            fields[field.name] = field.type
    if texts is not None:
        fields |= dict.fromkeys([TEMPLATE_COLUMN, *texts.pick_columns], pa.string())
    return pa.schema(list(fields.items()))


def _fingerprint(
    config: SweepConfig,
    axes: Sequence[Axis],
    texts: Texts | None,
    wildcards: Wildcards,
    source: Manifest | None,
) -> str:
    """Hash whatever the rows depend on, but the cap."""
    content = {
        "recipe": RECIPE,
        "source": None if source is None else source.fingerprint,
        "templates": None if texts is None else texts.templates,
        "wildcards": wildcards.digest,
        "axes": [axis.identity() for axis in axes],
        "mode": [config.mode, config.samples, config.choices, config.random_seed],
    }
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _summaries(
    axes: Sequence[Axis], texts: Texts | None, source: Manifest | None
) -> Iterator[AxisSummary]:
    replaced: set[str] = set()
    if source is not None:
        replaced = {axis.name for axis in axes} & set(source.schema.names)
        yield AxisSummary(name="prompts", num_values=source.num_rows, values=source.uri)
    if texts is not None:
        shown = ", ".join(quoted(text) for text in texts.templates[:3])
        if texts.seed is not None:
            shown += ", choices by chance"
        yield AxisSummary(name="template", num_values=texts.ends[-1], values=shown)
    for axis in axes:
        note = " (instead of the source's column)" if axis.name in replaced else ""
        yield AxisSummary(name=axis.name, num_values=axis.num_values, values=axis.describe() + note)
