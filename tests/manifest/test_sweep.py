"""open_sweep: the rows of every mode from any row on, the columns it keeps, and what it refuses."""

import random
import time
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.config import SweepConfig
from raydiff.errors import ConfigError, InputError, ManifestError
from raydiff.manifest.reader import MAX_BATCH_BYTES, Manifest, open_manifest
from raydiff.manifest.schema import check_value, known_values
from raydiff.manifest.sweep import open_sweep
from raydiff.manifest.writer import write_manifest


def rows(manifest: Manifest, start_row: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for first, batch in manifest.batches(start_row):
        assert first == start_row + len(found)
        assert batch.schema.equals(manifest.schema)
        found += batch.to_pylist()
    assert len(found) == manifest.num_rows - start_row
    return found


def sweep(source: Path | None = None, prompts: Any = (), **settings: Any) -> Manifest:
    config = SweepConfig.model_validate(settings)
    return open_sweep(config, source=None if source is None else str(source), prompts=prompts)


def source_file(folder: Path, num_rows: int) -> Path:
    rng = random.Random(7)
    path = folder / "source.parquet"
    table = {
        "prompt": [f"prompt {i} {rng.random()}" for i in range(num_rows)],
        "group": [rng.choice(["a", "b", None]) for _ in range(num_rows)],
        "seed": list(range(num_rows)),
    }
    pq.write_table(pa.table(table), path, row_group_size=100)
    return path


def test_cartesian_is_every_combination_the_seed_changes_first(tmp_path: Path) -> None:
    path = source_file(tmp_path, 1100)
    given = pq.read_table(path).to_pylist()
    manifest = sweep(path, grid={"guidance_scale": "3,7.5", "sampler": "euler,null"}, seeds="5-6")
    assert manifest.num_rows == 8800
    assert manifest.folder == tmp_path
    assert manifest.schema.names == ["prompt", "guidance_scale", "sampler", "seed", "group"]
    expected = [
        {"prompt": row["prompt"], "guidance_scale": scale, "sampler": sampler, "seed": seed,
         "group": row["group"]}
        for row, scale, sampler, seed in product(given, [3, 7.5], ["euler", None], [5, 6])
    ]  # fmt: skip
    for start_row in (0, 1, 7, 1024, 8191, 8799):
        assert rows(manifest, start_row) == expected[start_row:]


def test_template_axes_become_columns() -> None:
    manifest = sweep(
        template="a {colour} {cat|dog} of size {size}",
        grid={"colour": 'red,"blue, dark"', "size": [1, 2.5], "guidance_scale": [3]},
        seeds=4,
    )
    found = rows(manifest)
    assert len(found) == 2 * 2 * 2
    assert found[0] == {
        "prompt": "a red cat of size 1", "colour": "red", "size": 1.0, "guidance_scale": 3.0,
        "seed": 4, "template": "a {colour} {cat|dog} of size {size}", "choice_1": "cat",
    }  # fmt: skip
    assert [row["prompt"] for row in found] == [
        f"a {colour} {animal} of size {size}"
        for animal, colour, size in product(["cat", "dog"], ["red", "blue, dark"], ["1", "2.5"])
    ]
    assert [axis.num_values for axis in manifest.axes] == [2, 2, 2, 1, 1]


def test_templates_around_a_source_keep_its_prompts(tmp_path: Path) -> None:
    path = source_file(tmp_path, 50)
    (tmp_path / "style.txt").write_text("oil\n{soft|hard} ink\n")
    given = pq.read_table(path).to_pylist()
    templates = ("{prompt}, __style__", "{group}: {prompt} {seed}")
    manifest = sweep(path, template=templates, wildcards=str(tmp_path))
    found = rows(manifest)
    assert len(found) == 50 * (3 + 1)
    for row, block in zip(given, zip(*[iter(found)] * 4, strict=True), strict=True):
        assert [made["prompt"] for made in block] == [
            f"{row['prompt']}, oil",
            f"{row['prompt']}, soft ink",
            f"{row['prompt']}, hard ink",
            f"{row['group'] or ''}: {row['prompt']} {row['seed']}",
        ]
        assert [made["style"] for made in block] == ["oil", "soft ink", "hard ink", None]
        assert {made["source_prompt"] for made in block} == {row["prompt"]}
        assert [made["template"] for made in block] == [templates[0]] * 3 + [templates[1]]
    assert rows(manifest, 123) == found[123:]


def test_a_row_without_its_prompt_stays_without(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["x", None]}), tmp_path / "p.parquet")
    found = rows(sweep(tmp_path / "p.parquet", template="a {prompt}"))
    assert [row["prompt"] for row in found] == ["a x", None]


def test_prompts_are_data_and_templates_are_not(tmp_path: Path) -> None:
    odd = ["{a|b}", "__c__", '"<b>', "שלום", "nul\0\n"]
    manifest = sweep(prompts=odd, template=r"{prompt} \{x\}", seeds="0-1")
    assert [row["prompt"] for row in rows(manifest)] == [
        rf"{text} {{x}}" for text in odd for _ in "01"
    ]
    assert [row["prompt"] for row in rows(sweep(prompts=odd, seeds="7"))] == odd


def test_zip_goes_along_every_axis(tmp_path: Path) -> None:
    path = source_file(tmp_path, 3)
    prompts = pq.read_table(path)["prompt"].to_pylist()
    manifest = sweep(path, mode="zip", grid={"guidance_scale": [1, 2, 3], "sampler": "euler"},
                     seeds="7-9")  # fmt: skip
    found = rows(manifest)
    assert [row["prompt"] for row in found] == prompts
    assert [(row["guidance_scale"], row["seed"]) for row in found] == [(1, 7), (2, 8), (3, 9)]
    assert rows(manifest, 2) == found[2:]
    found = rows(sweep(mode="zip", prompts=["x"], template="{prompt} {a|b|c}", seeds="0-2"))
    assert [(row["prompt"], row["seed"]) for row in found] == [("x a", 0), ("x b", 1), ("x c", 2)]
    found = rows(sweep(path, mode="zip", template="{prompt} {a|b|c}", choices="random", seeds="5"))
    assert [row["source_prompt"] for row in found] == prompts


def test_a_sample_has_rows_of_the_whole_without_repeats(tmp_path: Path) -> None:
    path = source_file(tmp_path, 300)
    settings: dict[str, Any] = {"template": "{prompt} {a|b}", "seeds": "0-4"}
    everything = {tuple(row.items()) for row in rows(sweep(path, **settings))}
    sample = sweep(path, mode="random", samples=1500, **settings)
    found = [tuple(row.items()) for row in rows(sample)]
    assert len(set(found)) == 1500
    assert set(found) < everything
    assert [tuple(row.items()) for row in rows(sample, 1200)] == found[1200:]
    other = sweep(path, mode="random", samples=1500, random_seed=1, **settings)
    assert {tuple(row.items()) for row in rows(other)} != set(found)
    huge = sweep(path, mode="random", samples=10, seeds="0-9223372036854775807")
    assert len({row["seed"] for row in rows(huge)}) == 10


def test_random_choices_are_one_a_row_and_repeatable() -> None:
    settings: dict[str, Any] = {"template": "{a|b} {c|d}", "seeds": "0-1999", "choices": "random"}
    manifest = sweep(**settings)
    found = rows(manifest)
    assert len(found) == 2000
    assert {row["prompt"] for row in found} == {"a c", "a d", "b c", "b d"}
    assert all(row["prompt"] == f"{row['choice_1']} {row['choice_2']}" for row in found)
    assert 900 < sum(row["choice_1"] == "a" for row in found) < 1100
    assert rows(sweep(**settings)) == found
    assert rows(manifest, 1999) == found[1999:]
    assert rows(sweep(**settings, random_seed=1)) != found


def test_the_fingerprint_follows_whatever_rows_depend_on(tmp_path: Path) -> None:
    path = source_file(tmp_path, 3)
    (tmp_path / "w.txt").write_text("a\n")
    base: dict[str, Any] = {
        "template": "{prompt} __w__", "wildcards": str(tmp_path), "grid": {"sampler": "euler"},
        "seeds": "0-1",
    }  # fmt: skip
    first = sweep(path, **base).fingerprint
    assert sweep(path, **base, max_rows=10).fingerprint == first
    changes: list[dict[str, Any]] = [
        {"template": "{prompt}  __w__"}, {"grid": {"sampler": "ddim"}}, {"seeds": "0-2"},
        {"choices": "random"}, {"mode": "random", "samples": 3},
        {"choices": "random", "random_seed": 1},
    ]  # fmt: skip
    found = [sweep(path, **(base | change)).fingerprint for change in changes]
    (tmp_path / "w.txt").write_text("b\n")
    found.append(sweep(path, **base).fingerprint)
    pq.write_table(pa.table({"prompt": ["x"]}), path)
    found.append(sweep(path, **base).fingerprint)
    assert len({first, *found}) == len(found) + 1


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    manifest = sweep(
        source_file(tmp_path, 500), template="{prompt}, {a|b}", grid={"sampler": "euler,ddim"},
        seeds="0-999999", max_rows=10**10,
    )  # fmt: skip
    assert manifest.num_rows == 2 * 10**9
    before = pa.total_allocated_bytes()
    batches = manifest.batches(1_700_000_000)
    peak = max(pa.total_allocated_bytes() for _, (_, _) in zip(range(200), batches, strict=False))
    assert peak - before < 4e6


def test_long_prompts_make_small_batches() -> None:
    prompts = [f"{i}" + "x" * 600_000 for i in range(40)]
    manifest = sweep(prompts=prompts, template="{prompt} {prompt}", seeds="0-1")
    batches = [batch for _, batch in manifest.batches()]
    assert max(batch.nbytes for batch in batches) < 2 * MAX_BATCH_BYTES
    assert sum(batch.num_rows for batch in batches) == 80


@pytest.mark.parametrize("mode", ["cartesian", "random"])
def test_an_explosion_is_refused_at_once_with_its_count(mode: str) -> None:
    started = time.monotonic()
    settings: dict[str, Any] = {"seeds": "0-999999", "template": "{a|b|c|d|e|f|g|h|i|j} x"}
    if mode == "random":
        settings |= {"mode": "random", "samples": 10**9}
    with pytest.raises(ConfigError) as caught:
        sweep(prompts=[f"{i}" for i in range(100)], **settings)
    assert "sweep: 1,000,000,000 rows" in str(caught.value)
    assert "1,000,000 are allowed" in str(caught.value)
    assert "--max-rows 1000000000" in str(caught.value)
    assert time.monotonic() - started < 1
    assert sweep(prompts=["x"], seeds="0-1999999", max_rows=2_000_000).num_rows == 2_000_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": {"guidence_scale": "3"}}, 'guidence_scale: no such column, and no template has'),
        ({"grid": {"guidence_scale": "3"}}, 'did you mean "guidance_scale"?'),
        ({"grid": {"colur": "red"}, "template": "{colour}"}, "nothing fills the field {colour}; "
         'did you mean "colur"?'),
        ({"template": "{promt}"}, 'nothing fills the field {promt}; did you mean "prompt"?'),
        ({"grid": {"prompt": "a,b"}}, "not a grid axis"),
        ({"grid": {"seed": "1"}, "seeds": "2"}, "axis seed is there twice"),
        ({"grid": {"sampler": ""}}, "axis sampler has no values"),
        ({"grid": {"sampler": []}}, "axis sampler has no values"),
        ({"template": ("a", "a")}, "is there twice"),
        ({"mode": "zip", "seeds": "0-2", "grid": {"sampler": "euler,ddim"}},
         "sampler has 2, seed has 3"),
        ({"mode": "random", "seeds": "0-2"}, "--samples"),
        ({"samples": 3, "seeds": "0-2"}, "--mode random"),
        ({"template": "{choice_1} {a|b}", "grid": {"choice_1": "x"}}, 'the column "choice_1"'),
        ({"wildcards": "."}, "prompts are taken as they are"),
        ({"wildcards": ".", "template": "x"}, "no template uses one"),
        ({"wildcards": "gone", "template": "__x__"}, "gone is not a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(prompts=["a", "b", "c"][: 1 if "mode" in settings else 3], **settings)
    assert message in str(caught.value)


def test_nothing_to_sweep_over_and_sources_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to sweep over"):
        sweep(seeds="0-9")
    path = tmp_path / "p.csv"
    path.write_text("promts,n\na,1\n")
    with pytest.raises(ManifestError, match='no column "prompt"; did you mean "promts"'):
        sweep(path, seeds="0-9")
    assert rows(sweep(path, template="{promts}!"))[0]["prompt"] == "a!"
    with pytest.raises(ConfigError, match="one or the other"):
        sweep(path, prompts=["x"])
    pq.write_table(pa.table({"prompt": ["a"], "template": ["b"]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match='the column "template"'):
        sweep(tmp_path / "t.parquet", template="{prompt}")
    pq.write_table(pa.table({"prompt": ["a"], "height": ["b"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match='column "height" has the type string'):
        sweep(tmp_path / "t.parquet", seeds="0")


def test_a_wildcard_of_a_known_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("sdxl\n")
    with pytest.raises(ConfigError, match='the column "model"'):
        sweep(template="__model__", wildcards=str(tmp_path))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_lists_of_blocks_come_from_any_source_and_any_axis(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"source.{ending}"
    if ending == "jsonl":
        path.write_text(
            '{"prompt": "a", "stg_blocks": [28, 29]}\n{"prompt": "b", "stg_blocks": 3}\n'
            '{"prompt": "c"}\n'
        )
    elif ending == "csv":
        path.write_text('prompt,stg_blocks\na,"28,29"\nb,3\nc,\n')
    else:
        blocks = pa.array([[28, 29], [3], None], pa.large_list(pa.int16()))
        pq.write_table(pa.table({"prompt": ["a", "b", "c"], "stg_blocks": blocks}), path)
    expected = [("a", (28, 29)), ("b", (3,)), ("c", None)]
    given = sweep(path, seeds=[1, 2])
    assert checked_blocks(given) == [pair for pair in expected for _ in range(2)]
    # Written to Parquet, and read again.
    out = tmp_path / "manifest.parquet"
    write_manifest(given, out, rows_per_file=100)
    assert checked_blocks(open_manifest(out)) == checked_blocks(given)
    # An axis goes before the source's column.
    axis = sweep(path, grid={"stg_blocks": [[28, 29], [5], None]})
    assert checked_blocks(axis) == [
        (prompt, blocks) for prompt, _ in expected for blocks in ((28, 29), (5,), None)
    ]
    assert axis.fingerprint != sweep(path, grid={"stg_blocks": "28,29,5,null"}).fingerprint


def checked_blocks(manifest: Manifest) -> list[tuple[str, Any]]:
    """Return each row's prompt and blocks, as a request has them."""
    return [
        (
            row["prompt"],
            check_value("stg_blocks", row["stg_blocks"]) if "stg_blocks" in row else None,
        )
        for _, batch in manifest.batches()
        for row in known_values(batch)
    ]


def test_a_template_shows_a_list_as_text() -> None:
    grid = {"stg_blocks": [[28, 29], 3]}
    found = rows(sweep(template="a fox, blocks {stg_blocks}", grid=grid))
    assert [row["prompt"] for row in found] == ["a fox, blocks 28,29", "a fox, blocks 3"]
